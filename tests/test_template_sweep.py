"""A sweep with QAT in a project made from lightning-hydra-template, killed in the middle and continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.intent.plan import QuantPlan

PROJECT = Path(__file__).parents[1] / "examples" / "lightning_hydra_template"
SHORT = [
    "seed=1",
    "test=false",
    "trainer.max_epochs=2",
    "+trainer.limit_train_batches=4",
    "+trainer.limit_val_batches=2",
]
RULES = "[{match:'type:Conv2d',weight:{bit_widths:[2,4,8]}},{match:'type:Linear',weight:{bit_widths:[4,8]}}]"


def command(log_dir: Path, *arguments: str) -> list[str]:
    quiet = ["+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false", "~callbacks.lq_monitor"]
    sweeper = [f"hydra.sweeper.layers.rules={RULES}", "hydra.sweeper.heartbeat=1", "hydra.sweeper.n_trials=6"]
    fixed = ["-m", "+lq=qat", "hparams_search=lq_bits", f"paths.log_dir={log_dir}", *SHORT, *quiet, *sweeper]
    return [sys.executable, "src/train.py", *fixed, *arguments]


def run(log_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(log_dir, *arguments), cwd=PROJECT, env=env, capture_output=True, text=True, timeout=400, check=False
    )


def trials(folder: Path, *states: TrialState) -> list[FrozenTrial]:
    study = optuna.load_study(study_name="lq_bits", storage=f"sqlite:///{folder / 'study.db'}")
    return study.get_trials(deepcopy=False, states=states or None)


@pytest.mark.slow
def test_six_trials_with_a_kill_in_the_middle(tmp_path):
    sweep_dir = tmp_path / "train" / "multiruns" / "lq_bits"
    process = subprocess.Popen(command(tmp_path), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not (sweep_dir / "2" / ".hydra" / "overrides.yaml").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (running,) = trials(sweep_dir, TrialState.RUNNING)
    assert running.number == 2

    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    complete = trials(sweep_dir, TrialState.COMPLETE)
    assert len(complete) == len({tuple(trial.params.items()) for trial in complete}) == 6
    (failed,) = trials(sweep_dir, TrialState.FAIL)
    assert failed.params == running.params
    assert [trial.params for trial in complete if trial.system_attrs.get("retry_history") == [2]] == [failed.params]
    for trial in complete:
        job = sweep_dir / str(trial.number)
        given = yaml.safe_load((job / ".hydra" / "config.yaml").read_text())["callbacks"]["lq_qat"]["plan"]
        plan = QuantPlan.from_yaml(given)
        assert plan == QuantPlan.from_dict(trial.user_attrs["plan"])
        assert [rule.weight.bit_width for rule in plan.rules[1:]] == list(trial.params.values())  # type: ignore[union-attr]
        metrics = trial.user_attrs["metrics"]
        assert metrics["val/acc"] == trial.value
        assert 2 < metrics["effective_bits"] < 9
        assert len(trial.intermediate_values) == 2
    by_bits = sorted(complete, key=lambda trial: trial.params["type:Conv2d.weight.bits"])
    assert by_bits[0].user_attrs["metrics"]["effective_bits"] < by_bits[-1].user_attrs["metrics"]["effective_bits"]
    assert QuantPlan.from_yaml(sweep_dir / "best_plan.yaml")


@pytest.mark.slow
def test_costs_and_constraints_where_the_task_returns_one_number(tmp_path):
    settings = ["hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.costs=[effective_bits]"]
    done = run(tmp_path, *settings, "hydra.sweeper.constraints=['effective_bits <= 7']", "trainer.max_epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = trials(tmp_path / "train" / "multiruns" / "lq_bits")
    assert len(found) == 6
    assert "every combination has been tried" in done.stdout
    for trial in found:
        metrics = trial.user_attrs["metrics"]
        fits = metrics["effective_bits"] <= 7
        assert trial.state == (TrialState.COMPLETE if fits else TrialState.PRUNED)
        assert ("val/acc" in metrics) == fits, "what does not fit is not trained"
        if fits:
            assert trial.values == [metrics["val/acc"], metrics["effective_bits"]]


@pytest.mark.slow
def test_without_the_callback_it_is_refused(tmp_path):
    arguments = [argument for argument in command(tmp_path) if argument not in ("+lq=qat", "~callbacks.lq_monitor")]
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "quantization" in done.stderr
