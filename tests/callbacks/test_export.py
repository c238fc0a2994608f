"""Files that the Export callback writes, read back."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lq_plugin import PTQ, QAT, Export
from lq_plugin.errors import ExportError, MissingPackageError
from lq_plugin.export import load_packed, onnx_session
from tests.callbacks.conftest import Data, Module


def test_a_packed_file_after_a_fit(trainer, tmp_path):
    module, data = Module(), Data()
    export = Export(tmp_path / "files" / "model.safetensors")
    trainer(QAT("w4a8"), export).fit(module, datamodule=data)
    assert export.size == export.path.stat().st_size
    assert module.training, "as Lightning left it"
    loaded = Module().eval()
    load_packed(loaded, export.path)
    x = data.x[:8]
    with torch.no_grad():
        assert torch.equal(loaded(x), module.eval()(x))


@pytest.mark.parametrize("round_sums", [False, True])
def test_onnx_after_an_evaluation(trainer, tmp_path, round_sums):
    module, data = Module(), Data()
    path = tmp_path / "model.onnx"
    trainer(PTQ("w8a8"), Export(path, round_sums=round_sums, batches=2)).validate(
        module, datamodule=data, verbose=False
    )
    session, x = onnx_session(path), data.x[:5]
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = module.eval()(x)
    assert (torch.from_numpy(got) - expected).abs().max() < (0.05 if round_sums else 0.01) * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "model.pt"}, r"ends in .*.onnx .onnx. or .xml .openvino. or .safetensors .packed., got 'model.pt'"),
        ({"path": "model.onnx", "smallest": 3}, "smallest is 2, 4 or 8 bits, got 3"),
        (
            {"path": "model.onnx", "dynamic_dims": [0]},
            r"dynamic_dims are dims of the inputs after the batch, 1 or more, .*; got \[0\]",
        ),
        ({"path": "model.onnx", "dynamic_dims": "1"}, "dynamic_dims are dims .*; got '1'"),
        ({"path": "model.safetensors", "dynamic_dims": [1]}, "dynamic_dims is an option of onnx, not of packed"),
        ({"path": "model.onnx", "batches": 0}, "batches is a number of batches, 1 or more, got 0"),
        ({"path": "model.safetensors", "round_sums": True}, "round_sums is an option of onnx, not of packed"),
        ({"path": "model.onnx", "smalest": 4}, "onnx has no option 'smalest'; valid: .* Did you mean 'smallest'"),
        ({"path": "model.bin", "target": "packed"}, "model.bin: a file of packed ends in .safetensors"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ExportError, match=message):
        Export(**arguments)


def test_images_of_any_size(trainer, tmp_path):
    module, data, path = Module(), Data(), tmp_path / "model.onnx"
    trainer(PTQ("int4 per_channel"), Export(path, dynamic_dims=[2, 3])).validate(module, datamodule=data, verbose=False)
    session = onnx_session(path)
    for shape in ((1, 1, 6, 6), (3, 1, 9, 4)):
        x = torch.randn(shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), module.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match="dynamic_dims are dims after the batch that an input has, 1 to 3; got 4"):
        trainer(QAT("int4 per_channel"), Export(path, dynamic_dims=[4])).fit(Untrained(), datamodule=data)


class Untrained(Module):
    """Nothing may be trained before what is wrong is said."""

    def training_step(self, batch, batch_idx):
        pytest.fail("it was trained")


class TwoInputs(Untrained):
    def forward(self, x, mask):
        return super().forward(x)

    def validation_step(self, batch, batch_idx):
        return self(batch[0], None)


class Dicts(Data):
    def train_dataloader(self):
        return DataLoader([{"x": self.x[:8]}], batch_size=None)


@pytest.mark.parametrize("suffix", ["safetensors", "onnx"])
def test_a_run_without_quantization_is_refused_at_its_start(trainer, tmp_path, suffix):
    with pytest.raises(ExportError, match="Untrained is not quantized, .*: give the Trainer a QAT or PTQ callback"):
        trainer(Export(tmp_path / f"model.{suffix}")).fit(Untrained(), datamodule=Data())


@pytest.mark.parametrize("export_first", [False, True])
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"rules": [{"match": "*", "input": "mx9"}]}, r"net.conv.input \(mx9\): its scales are found at run time"),
        (
            {"rules": [{"match": "net.fc", "output": "uint8 affine"}]},
            r"net.fc.output \(uint8 affine\): a file has one step between two layers",
        ),
        ({"rules": [{"match": "net.fc", "weight": "kmeans2 per_channel"}]}, "ONNX has no tables for single channels"),
        (
            {"rules": [{"match": "net.fc", "weight": "mx9"}, {"match": "net.add_0", "input": "mx9"}]},
            r"net.add_0.*mx9.*: its scales are found at run time",
        ),
    ],
)
def test_plans_that_onnx_cannot_hold_are_refused_at_the_start_of_the_fit(
    trainer, tmp_path, plan, message, export_first
):
    callbacks = [QAT(plan), Export(tmp_path / "model.onnx")]
    with pytest.raises(ExportError, match=f"(?s)model.onnx cannot hold Untrained under its plan.*{message}"):
        trainer(*reversed(callbacks) if export_first else callbacks).fit(Untrained(), datamodule=Data())


def test_modules_and_batches_of_other_inputs_are_refused_before_they_are_trained_on(trainer, tmp_path):
    callbacks = QAT("int4 per_channel"), Export(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"TwoInputs.forward needs 2 inputs \(x, mask\)"):
        trainer(*callbacks).fit(TwoInputs(), datamodule=Data())
    data = Dicts()
    with pytest.raises(ExportError, match="a batch is a tensor or starts with one, got dict"):
        trainer(QAT("int4 per_channel", dataloader=Data().train_dataloader()), callbacks[1], limit_val_batches=0).fit(
            Untrained(), data
        )


def test_another_precision_is_refused_at_the_start_of_the_fit(trainer, tmp_path):
    with pytest.raises(ExportError, match=r"Untrained is in bfloat16 .* call model.float\(\)"):
        trainer(QAT("w4a8"), Export(tmp_path / "model.onnx"), precision="bf16-true").fit(Untrained(), datamodule=Data())


def test_computed_weights_are_said_at_the_start_and_may_be_made_plain_until_the_end(trainer, tmp_path):
    class Plain(Module):
        def __init__(self):
            super().__init__()
            nn.utils.parametrizations.weight_norm(self.net.fc)

        def on_train_end(self):
            nn.utils.parametrize.remove_parametrizations(self.net.fc, "weight")

    export = Export(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"Export: net.fc: its weight is computed .*, before the run ends"):
        trainer(QAT("w4a8"), export).fit(Plain(), datamodule=Data())
    assert export.size


@pytest.mark.parametrize("export_first", [False, True])
def test_plans_that_onnx_cannot_hold_are_refused_before_ptq_calibrates(trainer, tmp_path, export_first, monkeypatch):
    monkeypatch.setattr(PTQ, "quantize", lambda *_: pytest.fail("it was calibrated"))
    callbacks = [PTQ("int8 per_channel / mx9"), Export(tmp_path / "model.onnx")]
    with pytest.raises(
        ExportError, match=r"(?s)model.onnx cannot hold Module under its plan.*its scales are found at run time"
    ):
        trainer(*reversed(callbacks) if export_first else callbacks).validate(
            Module(), datamodule=Data(), verbose=False
        )


def test_weights_that_are_evaluated_float_are_refused_at_the_start(trainer, tmp_path):
    plan = {"rules": [{"match": "net.fc", "weight": "sign:float_eval stochastic"}]}
    with pytest.raises(ExportError, match=r"net.fc.weight .*evaluated with float weights"):
        trainer(QAT(plan), Export(tmp_path / "model.safetensors")).fit(Untrained(), datamodule=Data())


def test_packages_that_are_missing_are_said_at_construction(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        MissingPackageError, match=r"Export\('model.onnx'\) needs onnxscript, .* pip install \"lq_plugin\[onnx\]\""
    ):
        Export("model.onnx")
    Export("model.safetensors")
