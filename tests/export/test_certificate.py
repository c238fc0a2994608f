"""Certificates: outputs, layers and products of a file next to the model's, and what a command makes of them."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from lq_plugin import calibrate, prepare
from lq_plugin.commands.export import run_export
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.errors import ExportError
from lq_plugin.export import certify, export_model
from lq_plugin.export.certificate import computed_by
from lq_plugin.export.target import TARGETS
from lq_plugin.ptq import run_phases
from tests.export.test_cli import composed
from tests.models import randomize

pytest.importorskip("onnxruntime")

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def resnet(plan="w8a8"):
    torch.manual_seed(0)
    model = randomize(CifarResNet(8, 4)).eval()
    prepare(model, plan)
    calibrate(model, [X])
    return model


def exported(model, path, **options):
    export_model(model, path, (X,), [X], **options)
    return path


def test_a_right_file_differs_in_no_layer(tmp_path):
    model = resnet()
    found = certify(model, exported(model, tmp_path / "net.onnx", round_sums=True), [X])
    names = ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)), "linear"]
    assert [layer.name for layer in found.layers] == names
    assert found.layers[0].largest_steps == 0
    assert found.verification.agreement == 1
    # Seven convolutions and a linear layer, in ONNX Runtime's names.
    assert found.products.integer == {"QLinearConv": 7, "QGemm": 1}
    assert found.products.floating == {}
    assert (found.target, found.runtime, found.file) == ("onnx", "onnxruntime", "net.onnx")
    assert found.bytes == (tmp_path / "net.onnx").stat().st_size
    assert found.versions["torch"] == torch.__version__


def test_the_first_layer_that_reads_something_else_is_named(tmp_path):
    """A file of other weights: layers before the change read the same, the one after it does not."""
    model = resnet()
    path = exported(model, tmp_path / "net.onnx")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer2[0].conv1.weight.mul_(-1)
    found = certify(other, path, [X])
    assert found.first_difference == "layer2.0.conv2"
    steps = {layer.name: layer.largest_steps for layer in found.layers}
    assert steps["layer2.0.conv1"] < 1.5
    assert steps["layer2.0.conv2"] > 10
    # By hand: the difference of the two quantized inputs over the step.
    seen = []
    for each in (model, other):
        quantizer = each.layer2[0].conv2.input_quantizer
        handle = quantizer.register_forward_hook(lambda _q, _x, y: seen.append(y))
        with torch.no_grad():
            each(X)
        handle.remove()
    want = float(((seen[0] - seen[1]).abs() / quantizer.scale).max())
    assert steps["layer2.0.conv2"] == pytest.approx(want, abs=1e-3)
    assert found.verification.within_one_step < 0.9
    assert found.verification.largest_steps > 1


def test_products_of_float_activations_are_no_integer_products(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    prepare(model, "int4 group16")
    calibrate(model, ())
    x = torch.randn(8, 32)
    export_model(model, tmp_path / "net.onnx", (x,))
    found = certify(model, tmp_path / "net.onnx", [x])
    assert found.products.integer == {}
    assert found.products.total == 2
    assert found.layers == ()
    assert "computes 0 of 2 products with integers" in found.summary()


@pytest.mark.skipif(not TARGETS["onnx"].runtimes, reason="needs OpenVINO")
def test_openvino_says_its_precisions(tmp_path):
    pytest.importorskip("openvino")
    model = resnet()
    path = exported(model, tmp_path / "net.onnx", round_sums=True)
    found = certify(model, path, [X], runtime="openvino")
    assert found.products.total == 8
    assert found.products.integer.get("Convolution", 0) == 7
    assert found.runtime == "openvino"


def test_openvino_computes_plans_without_steps_before_sums(tmp_path):
    """In plans that have such steps, OpenVINO may leave out one rounding of each sum."""
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = randomize(CifarResNet(14, 16)).eval()
    run_phases(model, "w8a8", [X], ["fold_batch_norm", "calibrate", "round_biases"])
    path = tmp_path / "net.onnx"
    export_model(model, path, (X,), target="onnx")
    found = certify(model, path, [X], runtime="openvino")
    assert found.products.integer == {"Convolution": 13, "FullyConnected": 1}
    assert found.verification.within_one_step == 1


def test_nan_and_packed_files(tmp_path):
    model = resnet()
    export_model(model, tmp_path / "net.safetensors")
    found = certify(model, tmp_path / "net.safetensors", [X], lambda: CifarResNet(8, 4))
    assert found.verification.bit_equal
    assert (found.runtime, found.layers, found.products, found.first_difference) == ("torch", (), None, None)
    assert found.verification.within_one_step == 1
    with torch.no_grad():
        model.linear.bias[0] = torch.nan
    export_model(model, tmp_path / "nan.safetensors")
    found = certify(model, tmp_path / "nan.safetensors", [X], lambda: CifarResNet(8, 4))
    found.write(tmp_path / "nan.json")
    assert json.loads((tmp_path / "nan.json").read_text())["verification"]["largest_difference"] is None


def test_a_module_computed_by_its_file(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = resnet()

        def forward(self, x):
            y = self.net(x)
            return {"logits": y, "nothing": None, "twice": (2 * y,)}

    model = Two().eval()
    path = exported(model, tmp_path / "two.onnx")
    with torch.no_grad():
        want = model(X)
        with computed_by(model, TARGETS["onnx"], path, None) as calls:
            got = model(X)
            assert calls.number == 1
    assert (got["nothing"], list(got)) == (None, list(want))
    torch.testing.assert_close(got["twice"][0], want["twice"][0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(got["logits"], want["logits"])
    assert "forward" not in model.__dict__


def test_the_command_writes_it_and_fails_below_the_bound(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        path = run_export(composed(tmp_path, "plan=w8a8", "to=onnx", "verify.min_agreement=0.99"))
    content = json.loads(Path(f"{path}.certificate.json").read_text())
    assert content["verification"]["agreement"] >= 0.99
    assert content["metrics"]["file"]["val/acc"] == pytest.approx(content["metrics"]["model"]["val/acc"], abs=0.01)
    assert content["first_difference"] is None
    assert content["versions"].keys() >= {"lq_plugin", "onnxruntime", "torch"}
    assert "products with integers" in caplog.text
    assert "in the file" in caplog.text

    # A runtime that computes something else.
    original = type(TARGETS["onnx"]).open

    def turned(self, path, runtime, fresh):
        reader = original(self, path, runtime, fresh)
        return reader._replace(run=lambda *args: [-value for value in reader.run(*args)])

    monkeypatch.setattr(type(TARGETS["onnx"]), "open", turned)
    with pytest.raises(ExportError, match=r"verify: model.onnx agrees with the model on 0\.\d+ of 360 samples"):
        run_export(composed(tmp_path, "plan=w8a8", "to=onnx", "verify.min_agreement=0.99"))
    content = json.loads(Path(f"{path}.certificate.json").read_text())
    assert content["verification"]["agreement"] < 0.5
