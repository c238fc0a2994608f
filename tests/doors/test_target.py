"""A new export target from outside the package: a function, the command, the callback, refusals, verification."""

import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn

from lq_plugin import PTQ, Export, calibrate, prepare
from lq_plugin.commands.export import run_export
from lq_plugin.errors import ExportError, MissingPackageError, QuantizationError
from lq_plugin.export import export_model, verify
from lq_plugin.export.target import TARGETS, markdown, target_of
from tests.callbacks.conftest import Data, Module
from tests.export.test_cli import composed

TARGET = Path(__file__).with_name("codes_target.py")


@pytest.fixture
def npz():
    runpy.run_path(str(TARGET), run_name="codes_target")
    yield TARGETS["npz"]
    del TARGETS["npz"]


class Classifier(nn.Sequential):
    """Model that `lq-export` builds."""

    def __init__(self):
        super().__init__(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def classifier(plan="int4 per_channel"):
    torch.manual_seed(0)
    model = Classifier().eval()
    prepare(model, plan)
    calibrate(model, [torch.randn(4, 8)])
    return model


def test_a_function_writes_it_and_verify_runs_it(npz, tmp_path):
    model, path = classifier(), tmp_path / "model.npz"
    assert export_model(model, path, scale_dtype="float64") == path.stat().st_size
    arrays = np.load(path)
    weight = model[0].weight.detach().double().numpy()
    # Symmetric int4 on its full range: one of the two ends is the channel's extreme.
    scale = np.maximum(weight.max(1) / 7, -weight.min(1) / 8)
    np.testing.assert_allclose(arrays["0.scale"][:, 0], scale, rtol=1e-6)
    np.testing.assert_array_equal(arrays["0.q"], np.clip(np.round(weight / scale[:, None]), -8, 7))
    assert arrays["0.scale"].dtype == np.float64

    x = torch.randn(5, 8)
    result = verify(model, path, [x], Classifier)
    assert (result.samples, result.agreement, result.bit_equal) == (5, 1.0, True)
    with pytest.raises(ExportError, match=r"model.npz has no graph: give verify\(..., fresh=...\)"):
        verify(model, path, [x])


def test_refusals_come_from_one_place(npz, tmp_path):
    with pytest.raises(ExportError, match=r"0.weight \(mx6\): an archive .* nearest that fits is 'int4 per_channel'"):
        export_model(classifier("mx6"), tmp_path / "model.npz")
    with pytest.raises(ExportError, match="Classifier is not quantized"):
        export_model(Classifier(), tmp_path / "model.npz")
    with pytest.raises(ExportError, match="there is no folder"):
        export_model(classifier(), tmp_path / "no" / "model.npz")
    with pytest.raises(ExportError, match="scale_dtype is float32 or float64, got 'int8'"):
        export_model(classifier(), tmp_path / "model.npz", scale_dtype="int8")
    with pytest.raises(ExportError, match="smallest is an option of onnx, not of npz"):
        export_model(classifier(), tmp_path / "model.npz", smallest=4)
    with pytest.raises(ExportError, match="scale_dtype is an option of npz, not of packed"):
        export_model(classifier(), tmp_path / "model.safetensors", scale_dtype="float64")
    with pytest.raises(
        ExportError,
        match=r"ends in .*\.onnx \(onnx\) or \.xml \(openvino\) or \.safetensors \(packed\) or \.npz \(npz\), got",
    ):
        export_model(classifier(), tmp_path / "model.bin")
    with pytest.raises(ExportError, match="valid: .*, onnx, .*, npz. Did you mean 'npz'"):
        target_of(name="nzp")
    assert not list(tmp_path.iterdir())


def test_the_readme_lists_the_built_in_targets():
    assert markdown() in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_missing_packages_are_said_first(npz, tmp_path, monkeypatch):
    monkeypatch.setattr(type(npz), "packages", ("no_such_package",))
    with pytest.raises(MissingPackageError, match="needs no_such_package"):
        Export(tmp_path / "model.npz")


def test_the_callback_writes_it(npz, tmp_path):
    class Linear(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", callbacks=[PTQ("w4", phases=["calibrate"]), Export(tmp_path / "m.npz")], **quiet
    )
    trainer.validate(Linear(), datamodule=Data(), verbose=False)
    assert set(np.load(tmp_path / "m.npz")) == {"net.1.q", "net.1.scale", "net.1.bias"}
    with pytest.raises(ExportError, match=r"(?s)m.npz cannot hold Module under its plan.*conv.weight .*linear"):
        trainer.validate(Module(), datamodule=Data(), verbose=False)
    with pytest.raises(ExportError, match="scale_dtype is float32 or float64, got 16"):
        Export(tmp_path / "m.npz", scale_dtype=16)


def test_the_command_writes_and_verifies_it(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(TARGET.parent))
    monkeypatch.delitem(sys.modules, "codes_target", raising=False)
    plan = "plan={rules: [{match: 'head.*', weight: int4 per_channel}]}"
    options = ["to=npz", "imports=[codes_target]", "model.width=8", plan]
    try:
        with caplog.at_level(logging.INFO):
            path = run_export(composed(tmp_path, *options, "+scale_dtype=float64", "verify=true"))
        assert path == tmp_path / "model.npz"
        assert "360 samples: bit-equal" in caplog.text
        assert np.load(path)["head.2.q"].shape == (10, 16)
        with pytest.raises(ExportError, match=r"(?s)to=npz cannot hold DigitsCNN under its plan.*: an archive holds"):
            run_export(composed(tmp_path, *options[:3], "plan=int4 per_channel"))
    finally:
        TARGETS.pop("npz", None)
    with pytest.raises(QuantizationError, match="imports=no_such_module: .*is its project installed"):
        run_export(composed(tmp_path, *options[:1], "imports=[no_such_module]"))
