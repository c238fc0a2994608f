"""FP8 activations in ONNX files: ONNX Runtime's casts next to those of ml_dtypes, and what OpenVINO makes of them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import OpenVINOSession, certify, export_model, onnx_session
from lq_plugin.export.onnx_file.probe import layer_activations
from lq_plugin.export.target import TARGETS

pytest.importorskip("onnxruntime")

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TYPES = {"fp8": ml_dtypes.float8_e4m3fn, "fp8:e5m2": ml_dtypes.float8_e5m2}


def net(spec, weight="float", half=False):
    """Layers whose inputs come from a ReLU, and from one after which elements were moved."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    ).eval()
    model = model.half() if half else model
    prepare(model, QuantPlan([Rule("*", weight=weight, input=spec)]))
    calibrate(model, [X.half() if half else X])
    return model


def cast(x, scale, dtype):
    """By definition, with ml_dtypes: quotient, saturation, cast."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return (x / scale).clip(-largest, largest).astype(dtype).astype(np.float32) * scale


@pytest.mark.parametrize("weight", ["float", "fp8 per_channel", "int8 per_channel"])
@pytest.mark.parametrize("spec", ["fp8", "fp8:e5m2 ema", "fp8 percentile:99.9"])
def test_every_layer_reads_what_the_model_reads(spec, weight, tmp_path):
    model, path = net(spec, weight), tmp_path / "net.onnx"
    export_model(model, path, (X,))
    found = certify(model, path, [X])
    assert found.verification.agreement == 1.0
    assert found.verification.largest_steps < 1e-3
    if weight == "int8 per_channel":  # whose layers have names in the file
        assert [(layer.name, layer.largest_steps) for layer in found.layers] == [("0", 0.0), ("2", 0.0), ("6", 0.0)]


@pytest.mark.parametrize("spec", ["fp8", "fp8:e5m2"])
def test_relu_stays_and_values_are_those_of_one_cast(spec, tmp_path):
    """ONNX Runtime would leave out a Relu in front of the cast; a larger input than was calibrated on saturates."""
    torch.manual_seed(1)
    model, path = nn.Sequential(nn.ReLU(), nn.Linear(64, 64, bias=False)).eval(), tmp_path / "net.onnx"
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(64))
    prepare(model, QuantPlan([Rule("1", input=spec)]))
    x = torch.randn(512, 64) * torch.logspace(-4, 0, 512)[:, None]
    calibrate(model, [x[:, :32].repeat(1, 2)])
    export_model(model, path, (x,))
    scale = np.float32(model[1].input_quantizer.scale.item())
    expected = cast(x.numpy().clip(0), scale, TYPES[spec])
    (got,) = onnx_session(path).run(None, {onnx_session(path).get_inputs()[0].name: x.numpy()})
    np.testing.assert_array_equal(got, expected)


def test_openvino_rounds_them_by_way_of_float16(tmp_path):
    pytest.importorskip("openvino")
    model, path = nn.Sequential(nn.Linear(64, 64, bias=False)).eval(), tmp_path / "net.onnx"
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))
    prepare(model, QuantPlan([Rule("0", input="fp8")]))
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
    calibrate(model, [x])
    export_model(model, path, (x,))
    scale = np.float32(model[0].input_quantizer.scale.item())
    session = OpenVINOSession(path)
    (got,) = session.run(None, {session.names[0]: x.numpy()})
    twice = (x.numpy() / scale).astype(np.float16).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(got, twice)
    assert 1e-3 < (got != cast(x.numpy(), scale, ml_dtypes.float8_e4m3fn)).mean() < 1e-2


def test_half_models_cast_from_float(tmp_path):
    model, path = net("fp8", "int8 per_channel", half=True), tmp_path / "net.onnx"
    export_model(model, path, (X.half(),))
    (got,) = onnx_session(path).run(None, {onnx_session(path).get_inputs()[0].name: X.half().numpy()})
    expected = model(X.half()).detach().numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("spec", ["uint8 affine dynamic", "int8 per_channel"])
def test_certificates_compare_layers_under_other_scales(spec, tmp_path):
    """Scales that are found at run time, and one for each channel."""
    pytest.importorskip("onnx")
    model, path = net(spec, "int8 per_channel"), tmp_path / "net.onnx"
    export_model(model, path, (X,))
    found = certify(model, path, [X])
    assert (found.layers[0].name, found.layers[0].largest_steps) == ("0", 0.0)
    assert all(layer.largest_steps < 1.5 for layer in found.layers)
    import onnx

    assert len(layer_activations(onnx.load(path))) == len(found.layers) >= 2


@pytest.mark.parametrize(
    ("spec", "target", "words"),
    [
        ("fp8 per_channel", "onnx", "FP8 activations of these files have one scale; the nearest that fits is 'fp8'"),
        ("fp8 dynamic", "onnx", "DynamicQuantizeLinear has unsigned 8-bit integers"),
        ("fp8", "tensorrt", "activations of these files are integers; the nearest that fits is 'int8'"),
        ("fp8", "openvino", "activations of these files are integers"),
    ],
)
def test_what_a_target_does_not_hold_is_refused(spec, target, words, tmp_path):
    if target == "openvino":
        pytest.importorskip("openvino")
    weight = "int8 per_channel narrow" if target == "tensorrt" else "int8 per_channel"
    with pytest.raises(ExportError, match=words):
        export_model(net(spec, weight), tmp_path / f"net{TARGETS[target].suffix}", (X,), target=target)
