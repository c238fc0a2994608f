"""Runtimes change files unasked, or wrongly; files are written so that they do not."""

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session  # noqa: E402
from tests.export.test_biases import plain  # noqa: E402


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
    first, last = (
        (nn.Linear(32, 16), nn.Linear(16, 8)) if kind == "linear" else (nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1))
    )
    net, x = nn.Sequential(first, nn.ReLU(), last), torch.randn(5, 32) if kind == "linear" else torch.randn(5, 8, 6, 6)
    prepare(net, QuantPlan([Rule("*", weight=weight, input="uint8 affine")]))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"])
    for session in (onnx_session(tmp_path / "net.onnx", threads=1), plain(tmp_path / "net.onnx")):
        assert_exact(session, net, x)


@pytest.mark.parametrize("weight", ["int4 per_channel", "uint3 affine per_tensor", "int2 per_channel"])
def test_linear_layers_of_an_odd_number_of_inputs(weight, tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)),
        torch.randn(9, 25),
    )
    prepare(net, QuantPlan([Rule("*", weight=weight)]))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"], smallest=4)
    for session in (onnx_session(tmp_path / "net.onnx", threads=1), OpenVINOSession(tmp_path / "net.onnx", threads=1)):
        assert_exact(session, net, x)
        assert_exact(session, net, x[:3])


@pytest.mark.parametrize(
    ("spec", "block"), [("int2 group256 ragged", 128), ("uint2 affine group96 ragged", 32), ("int2 group64", 64)]
)
def test_groups_of_2_bits_are_those_that_have_a_kernel(spec, block, tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(320, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(5, 320)
    prepare(net, QuantPlan([Rule("0", weight=spec)]))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"])
    (node,) = [node for node in onnx.load(tmp_path / "net.onnx").graph.node if node.op_type == "DequantizeLinear"]
    assert {a.name: a.i for a in node.attribute}["block_size"] == block
    assert_exact(onnx_session(tmp_path / "net.onnx", threads=1), net, x)


def test_groups_without_a_kernel_are_named(tmp_path, caplog):
    net, x = nn.Sequential(nn.Linear(48, 8)), torch.randn(5, 48)
    prepare(net, "int2 group16")
    calibrate(net, [x])
    for smallest, warned in ((2, True), (4, False)):
        caplog.clear()
        with caplog.at_level("WARNING", "lq_plugin.export.onnx_file.write"):
            export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"], smallest=smallest)
        assert ("0: ONNX Runtime has no kernel for 2-bit groups of 16" in caplog.text) == warned
        assert_exact(onnx_session(tmp_path / "net.onnx", threads=1), net, x)


@pytest.mark.parametrize("inputs", ["uint8 per_channel affine", "int6 per_channel"])
def test_a_scale_for_each_channel_in_front_of_matrix_products(inputs, tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 4)),
        torch.randn(6, 5, 8) * torch.logspace(-2, 2, 8),
    )
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input=inputs)]))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"])
    for session in (onnx_session(tmp_path / "net.onnx", threads=1), OpenVINOSession(tmp_path / "net.onnx", threads=1)):
        got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(got, net(x).detach(), rtol=1e-5, atol=1e-5)


class Twice(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t() + x.square() @ self.weight.abs().t()


def test_weights_of_two_bits_that_are_transposed(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(Twice(64, 32)), torch.randn(8, 64)
    prepare(net, "int2 per_channel affine mse")
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"])
    assert_exact(onnx_session(tmp_path / "net.onnx", threads=1), net, x)
