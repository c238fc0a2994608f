"""`hydra/sweeper=lq` as a command: Hydra jobs as trials, through launchers, stopped and continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.search.study.objective import ERROR

APP = Path(__file__).parent / "sweep_app" / "app.py"
COMPLETE, FAIL, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING


def trials(file: Path, *states: TrialState) -> list[FrozenTrial]:
    """Returns the trials of the one study in this file; none before it is made."""
    if not file.exists():
        return []
    try:
        (name,) = optuna.get_all_study_names(f"sqlite:///{file}")
    except (ValueError, optuna.exceptions.StorageInternalError):
        return []
    return optuna.load_study(study_name=name, storage=f"sqlite:///{file}").get_trials(
        deepcopy=False, states=states or None
    )


def command(folder: Path, *arguments: str) -> list[str]:
    fixed = [
        "hydra/sweeper=lq",
        "hydra.sweeper.heartbeat=1",
        f"hydra.sweep.dir={folder / 'sweep'}",
        f"log={folder / 'jobs.txt'}",
    ]
    return [sys.executable, str(APP), "-m", *fixed, *arguments]


def hydra_run(folder: Path, *arguments: str, fails: bool = False) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(
        command(folder, *arguments), cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_hydra_jobs(tmp_path):
    output = hydra_run(
        tmp_path, "x=interval(0,1)", "net=glob(*)", "kind=good,raises", "steps=1", "hydra.sweeper.n_trials=6"
    )
    found = trials(tmp_path / "sweep" / "study.db")
    assert {trial.state for trial in found} <= {COMPLETE, FAIL}
    assert sum(trial.state == COMPLETE for trial in found) == 6
    for trial in found:
        config = OmegaConf.load(tmp_path / "sweep" / str(trial.number) / ".hydra" / "config.yaml")
        assert (config.x, config.kind) == (trial.params["x"], trial.params["kind"])
        assert config.net.width == {"small": 8, "wide": 32}[trial.params["net"]]
        if trial.state == FAIL:
            assert "Unpicklable: no luck" in trial.user_attrs[ERROR]
        else:
            assert trial.value == pytest.approx((config.x - 0.3) ** 2 + config.net.width / 100)
    assert "trial 0" in output
    assert (tmp_path / "sweep" / "multirun.yaml").exists()


@pytest.mark.slow
def test_batches_through_joblib(tmp_path):
    """One job raises what cannot be pickled, one takes the pool with it."""
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2", "two=true"]
    first = "hydra.sweeper.enqueue=[{kind:raises},{kind:good},{kind:exits},{kind:slow}]"
    settings = ["hydra.sweeper.direction=[minimize,minimize]", "hydra.sweeper.n_trials=4", first]
    hydra_run(tmp_path, *launcher, *settings, "x=interval(0,1)", "kind=good,raises,exits,slow")
    found = trials(tmp_path / "sweep" / "study.db")
    complete = [trial for trial in found if trial.state == COMPLETE]
    assert len(complete) >= 4
    assert not [trial for trial in found if trial.state == RUNNING]
    assert all(trial.values == [pytest.approx((trial.params["x"] - 0.3) ** 2 + 0.08), 8.0] for trial in complete)
    assert "Unpicklable: no luck" in found[0].user_attrs[ERROR]
    assert found[2].params["kind"] == "exits"
    assert found[2].state == FAIL
    (again,) = [trial for trial in found if 2 in trial.system_attrs.get("retry_history", ())]
    assert (again.params, again.state) == (found[2].params, COMPLETE)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_sweep_goes_on(tmp_path, stop):
    arguments = ["x=interval(0,1)", "kind=slow", "hydra.sweeper.n_trials=6"]
    process = subprocess.Popen(
        command(tmp_path, *arguments), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    # In the middle of the third job.
    while not (tmp_path / "jobs.txt").exists() or len((tmp_path / "jobs.txt").read_text().split()) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(stop)
    assert process.wait(60) != 0
    hydra_run(tmp_path, *arguments)
    found = trials(tmp_path / "sweep" / "study.db")
    complete = [trial for trial in found if trial.state == COMPLETE]
    assert len(complete) == 6
    assert len({trial.params["x"] for trial in complete}) == 6
    assert {trial.state for trial in found} <= {COMPLETE, FAIL}
    jobs = [int(line) for line in (tmp_path / "jobs.txt").read_text().split()]
    assert jobs == sorted(set(jobs)), "no trial runs twice"
    if stop == signal.SIGKILL:  # SIGTERM lets the job finish
        (failed,) = [trial for trial in found if trial.state == FAIL]
        assert [trial.params for trial in complete if failed.number in trial.system_attrs.get("retry_history", [])] == [
            failed.params
        ]
