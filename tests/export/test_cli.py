"""`lq-export`: from a checkpoint, and from a plan, to both kinds of file."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning import LightningDataModule, Trainer

from lq_plugin import PTQ, QAT
from lq_plugin.commands.common import log_once
from lq_plugin.commands.export import run_export
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import CalibrationError, ExportError, MissingPackageError, QuantizationError
from lq_plugin.export import load_packed

ROOT = Path(__file__).parent.parent.parent


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
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[QAT("w4a8")], logger=False, limit_val_batches=0, **quiet
    )
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
        path = run_export(
            composed(tmp_path, "plan=w8a8", "to=onnx", f"output={tmp_path}/deep/digits.onnx", "verify=true")
        )
    assert path.stat().st_size < 50_000
    (line,) = (record.message for record in caplog.records if "samples:" in record.message)
    assert float(line.partition("agreement ")[2].partition(",")[0]) > 0.99


class NoBatches(DigitsDataModule):
    """Data that fails when a batch is asked for."""

    def prepare_data(self) -> None:
        raise AssertionError("data was asked for")

    setup = val_dataloader = train_dataloader = prepare_data  # type: ignore[assignment]


def test_a_packed_file_needs_no_data(checkpoint: Path, tmp_path: Path) -> None:
    data = "data._target_=tests.export.test_cli.NoBatches"
    assert run_export(composed(tmp_path, "model.width=8", f"ckpt_path={checkpoint}", data)).stat().st_size > 0
    with pytest.raises(AssertionError, match="data was asked for"):
        run_export(composed(tmp_path, "model.width=8", f"ckpt_path={checkpoint}", data, "verify=true"))


class Prepared(DigitsDataModule):
    """Data that is not there before `prepare_data`."""

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
        composed(
            tmp_path,
            "model.width=8",
            f"ckpt_path={checkpoint}",
            "data._target_=tests.export.test_cli.Prepared",
            "verify=true",
        )
    )


def test_nan_is_said(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for key, value in content["state_dict"].items():
        if key.endswith("head.2.bias"):
            value[0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    with caplog.at_level(logging.INFO):
        run_export(composed(tmp_path, "model.width=8", f"ckpt_path={tmp_path}/nan.ckpt", "verify=true"))
    assert (
        "not bit-equal, agreement 0.0000, largest difference nan of the largest output (there is NaN in the outputs)"
        in caplog.text
    )


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PTQ, "quantize", lambda *_: pytest.fail("it was calibrated"))


@pytest.mark.usefixtures("no_calibration")
def test_batches_that_do_not_fit_are_refused_before_the_work(tmp_path: Path) -> None:
    options = ("to=onnx", "plan=w8a8")
    with pytest.raises(ExportError, match="got dict; call export_onnx.* from Python"):
        run_export(composed(tmp_path, *options, "data._target_=tests.export.test_cli.Dicts"))
    with pytest.raises(
        ExportError, match=r"forward needs 2 inputs \(x, mask\).* call lq_plugin.export.export_onnx\(model, \(x, mask\)"
    ):
        run_export(composed(tmp_path, *options, "model._target_=tests.export.test_cli.TwoInputs"))


class Residual(DigitsCNN):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + y.relu()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["to=onnx", "plan=mx9 / mx9"],
            r"(?s)to=onnx cannot hold DigitsCNN under its plan.*input \(mx9\): its scales are found at run time",
        ),
        (["to=onnx", "plan=kmeans3 per_channel"], "ONNX has no tables for single channels"),
        (
            ["plan=sign:float_eval stochastic"],
            "(?s)to=packed cannot hold DigitsCNN .*evaluated with float weights",
        ),
        (["plan={rules: [{match: boddy, weight: int8}]}"], "'boddy' matches no layer"),
        (["plan=w8a8", "phases=[calibrat]"], "Did you mean 'calibrate'"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_data_is_read(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=message):
        run_export(composed(tmp_path, "data._target_=tests.export.test_cli.NoBatches", *overrides))


@pytest.mark.usefixtures("no_calibration")
def test_operations_that_onnx_cannot_hold_are_refused_before_the_calibration(tmp_path: Path) -> None:
    plan = "plan={rules: [{match: '*', weight: int8 per_channel}, {match: 'type:add', input: mx9}]}"
    with pytest.raises(ExportError, match=r"add_0.*mx9.*: its scales are found at run time"):
        run_export(composed(tmp_path, "to=onnx", "model._target_=tests.export.test_cli.Residual", plan))


class Late(DigitsCNN):
    """One of its layers comes late."""

    def configure_model(self) -> None:
        self.late = torch.nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(super().forward(x))


@pytest.mark.usefixtures("no_calibration")
def test_layers_that_come_late_are_checked_before_the_calibration(tmp_path: Path) -> None:
    plan = "plan={rules: [{match: late, input: mx9}]}"
    with pytest.raises(ExportError, match=r"late.input \(mx9\): its scales are found at run time"):
        run_export(composed(tmp_path, "to=onnx", "model._target_=tests.export.test_cli.Late", plan))


class ValidationOnly(LightningDataModule):
    """With several loaders, as Lightning takes them."""

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.digits = DigitsDataModule(batch_size, num_workers)

    def setup(self, stage: str) -> None:
        self.digits.setup(stage)

    def val_dataloader(self) -> Any:
        return [self.digits.val_dataloader(), {"second": self.digits.val_dataloader()}]


class OfTwo(DigitsCNN):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("to", ["packed", "onnx"])
def test_weights_need_no_training_data_and_there_may_be_several_loaders(
    to: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    targets = ["data._target_=tests.export.test_cli.ValidationOnly", "model._target_=tests.export.test_cli.OfTwo"]
    with caplog.at_level(logging.INFO):
        run_export(
            composed(tmp_path, "plan=int4 per_channel", f"to={to}", "verify=true", "verify_batches=100", *targets)
        )
    assert "720 samples: " in caplog.text


@pytest.mark.parametrize(
    ("missing", "overrides", "message"),
    [
        (["onnx"], ["to=onnx"], r'to=onnx needs onnx, which is not installed: pip install "lq_plugin\[onnx\]"'),
        (["onnxscript"], ["to=onnx"], "to=onnx needs onnxscript"),
        (
            ["onnxruntime"],
            ["to=onnx", "verify=true"],
            r'to=onnx with verify=true needs onnxruntime, .* "lq_plugin\[onnx\]"',
        ),
        (
            ["onnx", "openvino"],
            ["to=onnx", "verify=true", "runtime=openvino"],
            r'needs onnx and openvino, .* "lq_plugin\[onnx,openvino\]"',
        ),
    ],
)
def test_missing_packages_are_said_before_the_work(
    missing: list[str], overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=message):
        run_export(composed(tmp_path, "plan=w8a8", "model._target_=no.such.model", *overrides))


def test_a_packed_file_needs_no_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    assert run_export(composed(tmp_path, "plan=w8a8", "verify=true")).stat().st_size > 0


def test_wrong_requests_are_told_at_once_without_a_traceback(tmp_path: Path) -> None:
    code = (
        "import atexit, sys; heavy = lambda: print('heavy:', [m for m in ('torch', 'lightning') if m in sys.modules]); "
        "atexit.register(heavy); from lq_plugin.commands.entry import export; export()"
    )
    command = [sys.executable, "-c", code, "plan=w4mxe", "to=onnx", "output=net.pt", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "words stand apart: 'w4 mse'" in done.stdout
    assert "net.pt: a file of onnx ends in .onnx" in done.stdout
    assert "heavy: []" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    full = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, "HYDRA_FULL_ERROR": "1"}
    )
    assert full.returncode == 1
    assert "Traceback" in full.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["to=onix"], "no export target 'onix'; valid: .*, onnx, .* Did you mean 'onnx'"),
        (["to=ONNX"], "no export target 'ONNX'; .* Did you mean 'onnx'"),
        (["to=torchao"], r"torchao writes no file, .* lq_plugin.export.use_torchao\(model\)"),
        (["verify=maybe"], "verify is true or false, or a mapping of run .*, got 'maybe'"),
        (["verify.min_agreement=1.5"], "verify is true or false, or .* min_agreement .0..1, or null., got"),
        (["verify=true", "~data"], "there is no data=...: verify=true runs the model on a batch of it"),
        (["ckpt_path=null"], "give either ckpt_path"),
        (["ckpt_path=runs/best.ckpt"], "ckpt_path=runs/best.ckpt: there is no such file"),
        (
            ["ckpt_path=null", "plan=w8a8", "float_checkpoint=flaot.ckpt"],
            "float_checkpoint=flaot.ckpt: there is no such file",
        ),
        (["float_checkpoint=float.ckpt"], "float_checkpoint=... is for plan=..."),
        (["ckpt_path=null", "plan=w8b8"], "cannot read the plan 'w8b8'"),
        (["ckpt_path=null", "plan=nope.yaml"], "nope.yaml"),
        (["runtime=openvin"], "Did you mean 'openvino'"),
        (["to=onnx", "output=foo.safetensors"], "foo.safetensors: a file of onnx ends in .onnx"),
        (["to=packed", "output=foo.onnx"], "foo.onnx: a file of packed ends in .safetensors"),
        (["to=packed", "round_sums=true"], "round_sums is an option of onnx, not of packed"),
        (["to=onnx", "smallest=3"], "smallest is 2, 4 or 8 bits, got 3"),
        (["to=onnx", "dynamic_dims=1"], "dynamic_dims are dims of the inputs after the batch, 1 or more, .*; got 1"),
        (["dynamic_dims=[1]"], "dynamic_dims is an option of onnx, not of packed"),
        (["verify_batches=0"], "verify_batches is an integer, 1 or more, got 0"),
    ],
)
def test_wrong_requests_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    # No such model: nothing is built.
    with pytest.raises(ExportError, match=message):
        run_export(composed(tmp_path, "ckpt_path=some.ckpt", "model._target_=no.such.model", *overrides))
    assert not list(tmp_path.iterdir())


def test_lightnings_use_of_a_deprecated_class_is_not_shown() -> None:
    text = (
        "`isinstance(treespec, LeafSpec)` is deprecated, "
        "use `isinstance(treespec, TreeSpec) and treespec.is_leaf()` instead."
    )
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        log_once()
        for module in ("lightning.pytorch.utilities._pytree", "somebody.else"):
            warnings.warn_explicit(text, FutureWarning, f"{module}.py", 1, module=module)
    assert [warning.filename for warning in shown] == ["somebody.else.py"]


def test_checkpoints_of_another_kind_or_model_are_named(checkpoint: Path, tmp_path: Path) -> None:
    float_checkpoint = tmp_path / "float.ckpt"
    torch.save({"state_dict": DigitsCNN(width=8).state_dict()}, float_checkpoint)
    with pytest.raises(
        ExportError, match=r"float.ckpt is a float checkpoint.*float_checkpoint=... .and plan=.... for others"
    ):
        run_export(composed(tmp_path, "model.width=8", f"ckpt_path={float_checkpoint}"))
    with pytest.raises(
        ExportError,
        match=r"quantized.ckpt is a checkpoint of a quantized model.*ckpt_path=... is for checkpoints of QAT",
    ):
        run_export(composed(tmp_path, "model.width=8", f"float_checkpoint={checkpoint}", "plan=w4a8"))
    with pytest.raises(ExportError, match=r"(?s)quantized.ckpt is of another model than model=....*size mismatch"):
        run_export(composed(tmp_path, "model.width=16", f"ckpt_path={checkpoint}"))


def test_a_folder_that_cannot_be_made_is_said_before_the_calibration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot make the folder .*file: File exists"):
        run_export(composed(tmp_path, "plan=w4a8", f"output={tmp_path}/file/net.safetensors"))


def test_without_any_data(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_export(composed(tmp_path, "model.width=8", f"ckpt_path={checkpoint}", "~data")).stat().st_size > 0
    with caplog.at_level(logging.INFO):
        run_export(composed(tmp_path, "plan=int4 per_channel", "phases=[calibrate]", "~data"))
    assert "PTQ without data, nothing is known of operations and MACs: 6 quantized" in caplog.text
    with pytest.raises(
        CalibrationError, match=r"no data=..., and fold_batch_norm needs a batch: give it, or phases=\[calibrate\]"
    ):
        run_export(composed(tmp_path, "plan=int4 per_channel", "~data"))
    with pytest.raises(CalibrationError, match=r"no data=..., and the ranges of activations come from it"):
        run_export(composed(tmp_path, "plan=w4a8", "phases=[calibrate]", "~data"))
