from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
import wandb
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from optuna.trial import TrialState

from lq_plugin.commands.common import told
from lq_plugin.commands.search import run
from lq_plugin.commands.sensitivity import run as measure
from lq_plugin.errors import MissingPackageError, QuantizationError
from lq_plugin.search import Space
from lq_plugin.search.study.worker import StudyWorker

ROOT = Path(__file__).parents[2]
SMALL = ["float_epochs=2", "model.width=8", "search.calibration_batches=1", "search.progress=false", "search.seeds=0"]


def composed(tmp_path: Path, *overrides: str, name: str = "search") -> Any:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        log_dir = f"paths.log_dir={tmp_path}"
        cfg = compose(name, ["experiment=digits_search", *SMALL, log_dir, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    return cfg


def states(folder: Path, name: str = "digits_search") -> list[TrialState]:
    return [trial.state for trial in optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db").trials]


def test_the_experiment_trains_once_searches_and_goes_on(tmp_path: Path, capsys: Any) -> None:
    first = run(composed(tmp_path, "search.n_trials=3"))
    folder = tmp_path / "digits_search"
    (checkpoint,) = folder.glob("float_*.ckpt")
    written = checkpoint.stat().st_mtime_ns
    assert "front of 3 trials" in capsys.readouterr().out
    second = run(composed(tmp_path, "search.n_trials=5"))
    assert checkpoint.stat().st_mtime_ns == written, "trained anew"
    assert [c.metric for c in second.candidates[:3]] == [c.metric for c in first.candidates]
    assert states(folder) == [TrialState.COMPLETE] * 5 + [TrialState.WAITING] * 2
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    assert [row["plan"] for row in rows] == [c.file_name for c in second.front]


def test_a_longer_training_is_another_model_and_another_study(tmp_path: Path) -> None:
    run(composed(tmp_path, "search.n_trials=2"))
    with pytest.raises(QuantizationError, match="weights of the model"):
        run(composed(tmp_path, "search.n_trials=2", "float_epochs=1"))


def test_loggers_get_every_trial_and_the_picture(tmp_path: Path) -> None:
    run(composed(tmp_path, "search.n_trials=3", "logger=csv"))
    (metrics,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert all(0 <= float(row["search/val/acc"]) <= 1 for row in rows)
    scores = [float(row["search/val/acc"]) for row in rows]
    assert [float(row["search/best/val/acc"]) for row in rows] == [max(scores[: n + 1]) for n in range(3)]
    (picture,) = metrics.parent.rglob("pareto.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("when", ["open", "run"])
def test_a_stop_leaves_as_itself_with_the_loggers_closed(tmp_path: Path, monkeypatch: Any, when: str) -> None:
    original = getattr(StudyWorker, when)

    def stopped(self: StudyWorker, *args: Any) -> None:
        if when == "run":
            original(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(StudyWorker, when, stopped)
    with pytest.raises(KeyboardInterrupt):
        run(composed(tmp_path, "search.n_trials=2", "logger=csv"))
    # What the loggers keep in memory is written.
    assert [len(list(tmp_path.rglob(name))) for name in ("hparams.yaml", "front.csv")] == [1, 2 * (when == "run")]


@pytest.mark.slow
def test_wandb_gets_a_run_for_each_trial_and_one_for_the_study(tmp_path: Path) -> None:
    result = run(
        composed(tmp_path, "search.n_trials=3", "logger=wandb", "+logger.wandb.group=mine", "+logger.wandb.tags=[tag]")
    )
    wandb.finish()
    runs: dict[str, list[Any]] = {"study": [], "trial": []}
    summary: dict[str, Any] = {}
    for log in sorted(tmp_path.rglob("run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        (start,) = [record["run"] for record in records if "run" in record]
        history = [record["history"]["item"] for record in records if "history" in record]
        runs[start["job_type"]].append((start, history))
        assert start["run_group"] == "mine"
        assert "tag" in start["tags"]
        if start["job_type"] == "study":
            for record in records:
                summary |= record.get("summary", {}).get("update", {})
    assert len(runs["study"]) == 1
    assert len(runs["trial"]) == 3
    for candidate in result.candidates:
        (history,) = [h for start, h in runs["trial"] if start["display_name"] == f"digits_search {candidate.number}"]
        assert history[0]["val/acc"] == pytest.approx(candidate.metric)
        assert history[0]["effective_bits"] == pytest.approx(candidate.effective_bits)
        (start,) = [found for found, _ in runs["trial"] if found["display_name"] == f"digits_search {candidate.number}"]
        config = start["config"]["update"]
        for rule in candidate.plan.rules:
            assert config[f"bits.{rule.match}"] == rule.weight.bit_width
            assert config[f"range.{rule.match}"] == rule.weight.range
            assert config[f"granularity.{rule.match}"] == str(rule.weight.granularity)
    best = result.best()
    assert summary["search/val/acc"] == pytest.approx(best.metric)
    assert summary["search/best/trial"] == best.number


@pytest.mark.slow
def test_no_file_and_no_word_holds_the_password_of_a_storage(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    secret = "hunter2-xyz"
    storage = f"sqlite:///file:{tmp_path}/study.db?uri=true&password={secret}"
    monkeypatch.setenv("STORAGE", storage)
    monkeypatch.setattr(sys, "argv", ["lq-search", f"search.storage={storage}"])
    loggers = {
        "csv": f"{{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: {tmp_path}/csv}}",
        "tensorboard": f"{{_target_: lightning.pytorch.loggers.TensorBoardLogger, save_dir: {tmp_path}/tensorboard}}",
        "wandb": f"{{_target_: lightning.pytorch.loggers.WandbLogger, save_dir: {tmp_path}, offline: true}}",
    }
    given = [
        "search.storage=${oc.env:STORAGE}",
        "search.n_trials=1",
        "float_epochs=0",
        f"hydra.runtime.output_dir={tmp_path}/job",
        "hydra.mode=RUN",
    ]
    cfg = composed(tmp_path / "logs", *given, *(f"+logger.{name}={value}" for name, value in loggers.items()))
    with told(cfg):
        run(cfg)
    cfg.search.metric = "none"
    with pytest.raises(SystemExit), told(cfg):
        run(cfg)
    monkeypatch.setenv("STORAGE", storage.replace("study.db", "none/study.db").replace("uri=true", "uri=never"))
    with pytest.raises(SystemExit), told(cfg):
        run(cfg)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"hparams.yaml", "report.html"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    assert any("tfevents" in path.name for path in written)
    assert [path for path in written if secret.encode() in path.read_bytes()] == []
    assert secret not in "".join(capfd.readouterr())


@pytest.mark.parametrize("space", ["weights", "weights_and_inputs"])
@pytest.mark.parametrize("sampler", ["surrogate", "tpe", "nsga2", "gp", "random"])
def test_every_space_and_sampler_of_the_configs_is_readable(tmp_path: Path, space: str, sampler: str) -> None:
    from hydra.utils import instantiate

    cfg = composed(tmp_path, f"search/space={space}", f"search/sampler={sampler}")
    assert Space.parse(cfg.search.space).weight
    assert isinstance(instantiate(cfg.search.sampler, seed=1), optuna.samplers.BaseSampler)


def lq_search(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from lq_plugin.commands.entry import search; search()",
        *arguments,
        *SMALL,
        f"paths.log_dir={tmp_path}/logs",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    # A folder of its own: `python -c` would otherwise find lq_plugin without its installed configs.
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_workers_share_a_study(tmp_path: Path) -> None:
    sweep = [
        "--config-dir",
        "sweeps",
        "--config-name",
        "digits",
        "-m",
        "worker=0,1",
        "hydra/launcher=joblib",
        "search.n_trials=14",
    ]
    process = lq_search(tmp_path, *sweep)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    folder = tmp_path / "logs" / "digits"
    study = optuna.load_study(study_name="digits", storage=f"sqlite:///{folder}/study.db")
    assert 14 <= len(study.trials) <= 15, "the last trial of the other worker may come on top"
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    assert len({str(sorted(t.params.items())) for t in study.trials}) == len(study.trials), (
        "the workers tried the same plan"
    )
    assert len(list(folder.glob("float_*.ckpt"))) == 1
    assert len(list((folder / "plans").iterdir())) == len((folder / "front.csv").read_text().splitlines()) - 1
    assert (folder / "worker_0" / "lq-search.log").exists()
    assert (folder / "worker_1" / "lq-search.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_best_plans_and_the_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    process = lq_search(tmp_path, "experiment=digits_search", "search.n_trials=100000")
    folder = tmp_path / "logs" / "digits_search"
    for _ in range(600):
        time.sleep(0.1)
        if some_trial_is_complete(folder):
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert TrialState.RUNNING not in states(folder)
    assert list((folder / "plans").iterdir())
    done = states(folder).count(TrialState.COMPLETE)
    output, _ = (process := lq_search(tmp_path, "experiment=digits_search", f"search.n_trials={done + 1}")).communicate(
        timeout=60
    )
    assert process.returncode == 0, output
    assert states(folder).count(TrialState.COMPLETE) == done + 1


def some_trial_is_complete(folder: Path) -> bool:
    """Not through Optuna: that would make the tables that the process under test is about to make."""
    if not (folder / "study.db").exists():
        return False
    with (
        closing(sqlite3.connect(f"file:{folder}/study.db?mode=ro", uri=True)) as connection,
        suppress(sqlite3.OperationalError),
    ):
        return bool(connection.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0])
    return False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.mode=maximum"], "mode is 'max' or 'min', got 'maximum'"),
        (["search.cost=effective_bit"], "unknown cost 'effective_bit'; valid: .* Did you mean 'effective_bits'"),
        (["search.n_trials=many"], "n_trials is an integer, 0 or more, got 'many'"),
        (["search.sensitivity=fischer"], "unknown sensitivity measure 'fischer'; valid: .* Did you mean 'fisher'"),
        (["search.constraints=['effective_bits < 4']"], "a constraint is written 'effective_bits <= 4.5'"),
        (["search.phases=[calibrat]"], "Did you mean 'calibrate'"),
        (
            ["search.latency={runtime: onnx}"],
            "unknown runtime 'onnx'; valid: ai_edge_litert, executorch, onnxruntime, openvino",
        ),
        (["search.space.weight={bit_widths: [99]}"], "bit_width must be 1..16, got 99"),
        (["search.space.rules=3000000000"], "search space: rules is a list of mappings, got 3000000000"),
        (["search.space.tie=7"], "search space: tie is a list of patterns, got 7"),
        (
            ["search.fidelity=[{batchs: 4}]", "search.promote_within=-1"],
            r"(?s)2 faults.*unknown key 'batchs'.*promote_within is a number from 0",
        ),
    ],
)
def test_wrong_options_are_said_before_a_model_is_trained(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lq_plugin.commands.search.train", lambda *_: pytest.fail("a model was trained"))
    with pytest.raises(QuantizationError, match=message):
        run(composed(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("package", "runtime", "extra"),
    [("onnx", "onnxruntime", "onnx"), ("onnxruntime", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")],
)
def test_packages_that_latency_needs_are_said_before_a_model_is_trained(
    package: str, runtime: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lq_plugin.commands.search.train", lambda *_: pytest.fail("a model was trained"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError,
        match=rf'latency needs {package}, which is not installed: pip install "lq_plugin\[{extra}\]"',
    ):
        run(composed(tmp_path, f"search.latency={{runtime: {runtime}}}", "search.cost=latency"))


@pytest.mark.parametrize(
    "override",
    ["measures=[fischer]", "others=wide", "search.space.weight={bit_widths: [99]}", "search.phases=[fold_batch_norm]"],
)
def test_wrong_measures_are_said_before_a_model_is_trained(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lq_plugin.commands.search.train", lambda *_: pytest.fail("a model was trained"))
    with pytest.raises(QuantizationError, match="Did you mean '(fisher|widest)'|got 99|they lack 'calibrate'"):
        measure(composed(tmp_path, override, name="sensitivity"))
