"""`lq-export`: from a checkpoint, and from a plan, to both kinds of file."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer

from lq_plugin import QAT
from lq_plugin.cli import log_once, run_export
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


class NoBatches(DigitsDataModule):
    """Of which nothing may be asked."""

    def prepare_data(self) -> None:
        raise AssertionError("data was asked for")

    setup = val_dataloader = train_dataloader = prepare_data  # type: ignore[assignment]


def test_a_packed_file_needs_no_data(checkpoint: Path, tmp_path: Path) -> None:
    data = "data._target_=tests.export.test_cli.NoBatches"
    assert run_export(composed(tmp_path, "model.width=8", f"ckpt_path={checkpoint}", data)).stat().st_size > 0
    with pytest.raises(AssertionError, match="data was asked for"):
        run_export(composed(tmp_path, "model.width=8", f"ckpt_path={checkpoint}", data, "verify=true"))


class Prepared(DigitsDataModule):
    """Which has no data before `prepare_data`."""

    ready = False

    def prepare_data(self) -> None:
        self.ready = True

    def setup(self, stage: str) -> None:
        assert self.ready
        super().setup(stage)


class Dicts(DigitsDataModule):
    def val_dataloader(self) -> Any:
        return [{"x": torch.zeros(1, 1, 8, 8)}]


class TwoInputs(DigitsCNN):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x * mask)


def test_data_is_prepared_first(checkpoint: Path, tmp_path: Path) -> None:
    run_export(
        composed(tmp_path, "model.width=8", f"ckpt_path={checkpoint}", "data._target_=tests.export.test_cli.Prepared", "verify=true")
    )


def test_nan_is_said(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for key, value in content["state_dict"].items():
        if key.endswith("head.2.bias"):
            value[0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    with caplog.at_level(logging.INFO):
        run_export(composed(tmp_path, "model.width=8", f"ckpt_path={tmp_path}/nan.ckpt", "verify=true"))
    assert "not bit-equal, agreement 0.0000, largest difference nan of the largest output (there is NaN in the outputs)" in caplog.text


def test_batches_that_do_not_fit_are_refused_before_the_work(tmp_path: Path) -> None:
    # The checkpoint is missing: what is said before that is said before the work.
    options = ("to=onnx", "ckpt_path=missing.ckpt")
    with pytest.raises(ExportError, match="got dict; call export_onnx.* from Python"):
        run_export(composed(tmp_path, *options, "data._target_=tests.export.test_cli.Dicts"))
    with pytest.raises(ExportError, match=r"forward needs 2 inputs \(x, mask\).* call lq_plugin.export.export_onnx\(model, \(x, mask\)"):
        run_export(composed(tmp_path, *options, "model._target_=tests.export.test_cli.TwoInputs"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["to=onix"], "to=onix: .* Did you mean 'onnx'"),
        (["ckpt_path=null"], "give either ckpt_path"),
        (["runtime=openvin"], "Did you mean 'openvino'"),
        (["to=onnx", "output=foo.safetensors"], "output=foo.safetensors: a file of to=onnx ends in .onnx"),
        (["to=packed", "output=foo.onnx"], "output=foo.onnx: a file of to=packed ends in .safetensors"),
        (["to=packed", "round_sums=true"], "round_sums=true is for to=onnx"),
        (["to=onnx", "smallest=3"], "smallest is 2, 4 or 8 bits, got 3"),
        (["verify_batches=0"], "verify_batches is a number of batches, 1 or more, got 0"),
    ],
)
def test_wrong_requests_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    # No such model: nothing is built.
    with pytest.raises(ExportError, match=message):
        run_export(composed(tmp_path, "ckpt_path=some.ckpt", "model._target_=no.such.model", *overrides))
    assert not list(tmp_path.iterdir())


def test_lightnings_use_of_a_deprecated_class_is_not_shown() -> None:
    text = "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec) and treespec.is_leaf()` instead."
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        log_once()
        for module in ("lightning.pytorch.utilities._pytree", "somebody.else"):
            warnings.warn_explicit(text, FutureWarning, f"{module}.py", 1, module=module)
    assert [warning.filename for warning in shown] == ["somebody.else.py"]
