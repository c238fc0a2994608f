"""What runtimes do to a file unasked, or wrongly, and what keeps them from it."""

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session


def assert_exact(session, net, x):
    want = net(x).detach()
    got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    # A value between two levels of the next layer may go either way, so most are compared closely.
    assert (got - want).abs().median() <= 1e-5 * want.abs().max()
    assert (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("weight", ["kmeans4", "ttq", None])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float_weights_are_not_rounded(kind, weight, tmp_path):
    torch.manual_seed(0)
    # Weights are rounded where the output is quantized as well.
    first, last = (nn.Linear(32, 16), nn.Linear(16, 8)) if kind == "linear" else (nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1))
    net, x = nn.Sequential(first, nn.ReLU(), last), torch.randn(5, 32) if kind == "linear" else torch.randn(5, 8, 6, 6)
    prepare(net, QuantPlan([Rule("*", weight=weight, input="uint8 affine")]))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"])
    assert_exact(onnx_session(tmp_path / "net.onnx", threads=1), net, x)


@pytest.mark.parametrize("weight", ["int4 per_channel", "uint3 affine per_tensor", "int2 per_channel"])
def test_linear_layers_of_an_odd_number_of_inputs(weight, tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)), torch.randn(9, 13)
    prepare(net, QuantPlan([Rule("*", weight=weight)]))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"], smallest=4)
    for session in (onnx_session(tmp_path / "net.onnx", threads=1), OpenVINOSession(tmp_path / "net.onnx", threads=1)):
        assert_exact(session, net, x)
        assert_exact(session, net, x[:3])
