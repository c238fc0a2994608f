"""Sums of products of 8 bits are exact on every processor, whatever its runtimes do."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.layers.integer.kernels import LARGEST_EXACT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session, openvino, runtime  # noqa: E402


def extreme(weight: str) -> tuple[nn.Module, torch.Tensor]:
    """A convolution and linear layers of the largest weights, on the largest inputs: products saturate wherever they
    can."""
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 16), nn.Linear(16, 16, bias=False)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2], net[3]):
            layer.weight.copy_(torch.rand_like(layer.weight) * 0.05 + 1.0)
    x = torch.rand(4, 8, 6, 6) * 0.1 + 1.0
    prepare(net, QuantPlan([Rule("*", weight=weight, input="uint8 affine minmax")]))
    calibrate(net, [x])
    return net, x


def check(session, net, x):
    want = net(x).detach().numpy()
    got = session.run(None, {"x": x.numpy()})[0]
    # The inputs of a layer may round to the neighbouring level; a saturated sum is a third too small.
    np.testing.assert_allclose(got, want, rtol=0.01)


@pytest.mark.parametrize(
    "weight", ["int8 per_channel", "int8 per_tensor", "uint8 affine per_channel", "int7 per_channel", "int8 group8"]
)
def test_both_runtimes_sum_exactly(weight, tmp_path):
    pytest.importorskip("openvino")
    net, x = extreme(weight)
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    check(onnx_session(tmp_path / "net.onnx"), net, x)
    check(onnx_session((tmp_path / "net.onnx").read_bytes()), net, x)
    check(OpenVINOSession(tmp_path / "net.onnx"), net, x)


@pytest.mark.parametrize("weight", ["int8 per_channel", "int8 per_tensor"])
def test_weights_as_unsigned_are_the_same_numbers(weight, tmp_path, monkeypatch):
    """On a processor that saturates the file is read as one of uint8 weights with the same values."""
    net, x = extreme(weight)
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    model = onnx.load(tmp_path / "net.onnx")
    kinds = {t.name: t.data_type for t in model.graph.initializer if t.name.endswith("weight_codes")}
    assert set(kinds.values()) == {onnx.TensorProto.INT8}
    real = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]
    assert runtime._weights_as_unsigned(model)
    onnx.checker.check_model(model, full_check=True)
    assert {t.data_type for t in model.graph.initializer if t.name in kinds} == {onnx.TensorProto.UINT8}
    np.testing.assert_array_equal(onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0], real)
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    check(onnx_session(tmp_path / "net.onnx"), net, x)


def test_seven_bits_stay_as_they_are(tmp_path):
    net, x = extreme("int7 per_channel")
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    assert not runtime._weights_as_unsigned(onnx.load(tmp_path / "net.onnx"))


@pytest.mark.parametrize(("weight", "said"), [("int8 per_channel", True), ("int7 per_channel", False)])
def test_float_kernels_are_said(weight, said, tmp_path, monkeypatch, caplog):
    """The processor is taken for one that saturates."""
    pytest.importorskip("openvino")
    monkeypatch.setattr("lq_plugin.export.openvino.saturates", lambda: True)
    openvino._say_once.cache_clear()
    net, x = extreme(weight)
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    with caplog.at_level(logging.WARNING, "lq_plugin.export.openvino"):
        session = OpenVINOSession(tmp_path / "net.onnx")
    assert any("float kernels compute such files" in record.getMessage() for record in caplog.records) == said
    check(session, net, x)


def test_what_fits_in_16_bits():
    assert not runtime.exceeds_16_bits(np.array([64, -64], np.int8))
    assert runtime.exceeds_16_bits(np.array([65], np.int8))
    assert runtime.exceeds_16_bits(np.array([-128], np.int8))
    assert 2 * 255 * LARGEST_EXACT <= 2**15 - 1 < 2 * 255 * (LARGEST_EXACT + 1)
