"""`+lq=qat` and `+lq=ptq` in a project made from lightning-hydra-template, which knows nothing of this library."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1] / "examples" / "lightning_hydra_template"
SHORT = ["seed=1", "trainer.max_epochs=1", "+trainer.enable_progress_bar=false"]


def script(name: str, *arguments: str) -> str:
    command = [sys.executable, f"src/{name}", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def metric(output: str, name: str) -> float:
    (value,) = re.findall(rf"{name}\s+│\s+([\d.e-]+)", output)
    return float(value)


@pytest.fixture(scope="module")
def float_run(tmp_path_factory) -> tuple[str, Path]:
    """Output and checkpoint of a float training."""
    logs = tmp_path_factory.mktemp("logs")
    output = script("train.py", *SHORT, f"paths.log_dir={logs}")
    (checkpoint,) = logs.glob("train/runs/*/checkpoints/epoch_*.ckpt")
    return output, checkpoint


def test_the_project_does_not_know_the_library():
    for path in PROJECT.rglob("*"):
        if path.suffix in (".py", ".yaml"):
            assert not re.search(r"lq|quant", path.read_text()), path


@pytest.mark.slow
def test_the_config_shows_the_callback():
    job = yaml.safe_load(script("train.py", "+lq=qat", "quantization=w4a4", "--cfg", "job"))
    assert job["callbacks"]["lq_qat"]["_target_"] == "lq_plugin.QAT"
    assert set(job["callbacks"]) == {"model_checkpoint", "early_stopping", "lq_qat", "lq_monitor"}
    assert job["quantization"]["rules"][0]["weight"] == "int4 per_channel mse"


def test_qat_trains_and_tests_quantized(float_run, tmp_path):
    output = script("train.py", "+lq=qat", *SHORT, f"paths.log_dir={tmp_path}")
    assert "QAT: 4 quantized" in output
    assert "QAT" not in float_run[0]
    assert metric(output, "test/loss") != metric(float_run[0], "test/loss")


@pytest.mark.slow
def test_ptq_evaluates_a_float_checkpoint_quantized(float_run, tmp_path):
    output, checkpoint = float_run
    arguments = ["+trainer.enable_progress_bar=false", f"ckpt_path={checkpoint}", f"paths.log_dir={tmp_path}"]
    quantized = script("eval.py", "+lq=ptq", "quantization=w8a8", *arguments)
    assert "PTQ: 4 quantized" in quantized
    near, exact = metric(quantized, "test/loss"), metric(output, "test/loss")
    assert near != exact
    assert near == pytest.approx(exact, rel=0.05)
