"""Each page's script, with settings small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lq_plugin import QuantPlan
from lq_plugin.commands.report_sources import load_report
from lq_plugin.search.shared.database import quiet
from tests.examples.conftest import EXAMPLES
from tests.report.browser import why_not

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
Load = Callable[[str], ModuleType]


def test_qat_in_an_existing_project(
    example: Load, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    scores = example("qat_existing_project").main(["--output", str(tmp_path), "--float-epochs", "3", "--epochs", "3"])
    assert scores["quantized"] > 0.85
    assert (tmp_path / "quantized.ckpt").is_file()
    report = load_report(tmp_path).model
    assert report is not None
    assert {series.name for series in report.training} >= {"train/loss", "val/acc", "quant_layer/mix.0/weight_sqnr_db"}
    assert report.epoch_steps == 17
    assert "whole model" in capsys.readouterr().out


def test_ptq_with_learned_rounding(example: Load) -> None:
    scores = example("ptq_learned_rounding").main(["--float-epochs", "3", "--iterations", "40"])
    assert scores["float"] > 0.9
    # Two bits rounded to nearest lose tens of points, which even a few iterations find again.
    assert scores["AdaRound"] > scores["nearest"]
    assert scores["BRECQ"] > scores["nearest"]


@pytest.mark.slow
def test_a_sweep_on_one_machine_goes_on(example: Load, tmp_path: Path) -> None:
    script = example("sweep_one_machine")
    first = script.main(["--output", str(tmp_path), "--trials", "8", "--float-epochs", "2"])
    assert len(first.candidates) >= 8
    assert all(c.effective_bits <= 6 for c in first.candidates)
    assert first.best(4.0).plan == QuantPlan.from_yaml(tmp_path / "chosen.yaml")
    more = script.main(["--output", str(tmp_path), "--trials", "10", "--float-epochs", "2"])
    assert [c.plan for c in more.candidates[: len(first.candidates)]] == [c.plan for c in first.candidates]


@pytest.mark.parametrize("name", ["ttq", pytest.param("bwn", marks=pytest.mark.slow)])
def test_low_bit_training(example: Load, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path), "--format", name, "--float-epochs", "3", "--epochs", "4"]
    scores = example("low_bit_training").main(options)
    assert scores["bits"] < 2.4
    assert scores["test/acc"] > 0.6
    assert "flips an epoch in block.conv1" in capsys.readouterr().out
    report = load_report(tmp_path).model
    assert report is not None
    assert [(phase.unit, phase.count) for phase in report.schedule if phase.count] == [("epoch", 1), ("epoch", 3)]


def test_export_and_serve(example: Load, tmp_path: Path) -> None:
    scores = example("export_and_serve").main(["--output", str(tmp_path), "--float-epochs", "2"])
    assert scores["onnx"] == pytest.approx(scores["torch"], abs=2 / 360)
    assert (tmp_path / "digits.onnx").stat().st_size < 60_000


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
def test_a_transformer_to_vllm(example: Load, tmp_path: Path) -> None:
    options = ["--output", str(tmp_path / "model"), "--float-epochs", "4", "--epochs", "1"]
    losses = example("transformer_to_vllm").main(options)
    assert losses["trained"] < losses["float"] < losses["rounded"] < 4.5
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 125_000


def test_a_language_model_to_llama_cpp(example: Load, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    options = ["--output", str(tmp_path / "model.gguf"), "--float-epochs", "4", "--epochs", "1"]
    losses = example("language_model_to_llama_cpp").main(options)
    assert losses["trained"] < losses["float"] < losses["rounded"] < 4.5
    assert (tmp_path / "model.gguf").stat().st_size < 160_000


def test_a_cnn_to_tensorrt(example: Load, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = example("cnn_to_tensorrt").main(["--output", str(tmp_path / "digits.onnx")])
    assert found.verification.agreement > 0.99
    assert found.target == "tensorrt"


def cluster(*overrides: str) -> Any:
    with initialize_config_dir(str(EXAMPLES / "cluster"), version_base="1.3"):
        cfg = compose(
            "cluster", overrides=["hydra.searchpath=[pkg://lq_plugin.conf]", *overrides], return_hydra_config=True
        )
    OmegaConf.set_struct(cfg, False)
    return cfg


def test_the_cluster_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE", "postgresql+psycopg2://lq:secret@db.example.org/lq")
    cfg = cluster("hydra/launcher=slurm", "hydra.launcher.partition=short")
    assert cfg.search.storage == "postgresql+psycopg2://lq:secret@db.example.org/lq"
    assert cfg.search.n_trials == 400
    assert cfg.search.heartbeat == 60
    assert list(cfg.search.cost) == ["effective_bits", "bops"]
    assert "input" in cfg.search.space
    assert cfg.hydra.launcher._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert cfg.hydra.launcher.partition == "short"
    monkeypatch.delenv("STORAGE")
    assert cluster().search.storage is None


@pytest.mark.slow
def test_a_sweep_with_two_workers_of_the_cluster_script(tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    env = {name: value for name, value in os.environ.items() if name != "STORAGE"}
    env |= {
        "PATH": f"{bin_folder}{os.pathsep}{env['PATH']}",
        "WORKERS": "2",
        "LAUNCHER": "joblib",
        "OMP_NUM_THREADS": "1",
    }
    small = ["search.n_trials=6", "float_epochs=1", "model.width=8", "search.seeds=0", "search.calibration_batches=1"]
    command = [str(EXAMPLES / "sweep_cluster.sh"), *small, "search.progress=false"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "logs" / "cluster"
    with quiet():
        study = optuna.load_study(study_name="cluster", storage=f"sqlite:///{folder}/study.db")
    assert len([trial for trial in study.trials if trial.state.name == "COMPLETE"]) >= 6
    assert {path.name for path in folder.glob("worker_*")} == {"worker_0", "worker_1"}
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_the_demo_and_its_pictures(tmp_path: Path) -> None:
    root = EXAMPLES.parent
    small = ["--trials", "20", "--budget", "9", "--float-epochs", "2", "--qat-epochs", "2", "--width", "8"]
    options = ["--output", str(tmp_path / "demo"), *small]
    env = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    for command in (
        ["-m", "lq_plugin.demo", *options],
        ["-m", "examples.docs_pictures", str(tmp_path / "demo"), "--output", str(tmp_path / "pictures")],
    ):
        if "pictures" in command[1] and (reason := why_not()):
            pytest.skip(reason)
        done = subprocess.run(
            [sys.executable, *command], cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert set(pictures) == {"report", "layer", "study", "pareto"}
    assert all(png.startswith(b"\x89PNG") and 5_000 < len(png) < 300_000 for png in pictures.values())
