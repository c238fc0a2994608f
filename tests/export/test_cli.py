"""`lq-export`: from a checkpoint, and from a plan, to both kinds of file."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer

from lq_plugin import QAT
from lq_plugin.cli import run_export
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import ExportError
from lq_plugin.export import load_packed


def composed(tmp_path: Path, *overrides: str) -> Any:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        options = [f"paths.output_dir={tmp_path}", "trainer=cpu", *overrides]
        cfg = compose("export", options, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "quantized.ckpt"
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[QAT("w4a8")], logger=False, limit_val_batches=0, **quiet)
    trainer.fit(DigitsCNN(width=8), datamodule=DigitsDataModule())
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_becomes_a_packed_file(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        path = run_export(composed(tmp_path, "model.width=8", f"ckpt_path={checkpoint}", "verify=true"))
    assert path == tmp_path / "model.safetensors"
    assert "360 samples: bit-equal" in caplog.text
    model = DigitsCNN(width=8)
    load_packed(model, path)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_plan_is_calibrated_and_becomes_onnx(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("onnxruntime")
    with caplog.at_level(logging.INFO):
        path = run_export(composed(tmp_path, "plan=w8a8", "to=onnx", f"output={tmp_path}/deep/digits.onnx", "verify=true"))
    assert path.stat().st_size < 50_000
    (line,) = (record.message for record in caplog.records if "samples:" in record.message)
    assert float(line.partition("agreement ")[2].partition(",")[0]) > 0.99


def test_wrong_requests_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="to=onix: .* Did you mean 'onnx'"):
        run_export(composed(tmp_path, f"ckpt_path={checkpoint}", "to=onix"))
    with pytest.raises(ExportError, match="give either ckpt_path"):
        run_export(composed(tmp_path))
