"""Activations of ONNX files as signed integers with zero point 0, on request."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model, runtime
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS
from tests.models import randomize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import export_onnx, onnx_session  # noqa: E402
from lq_plugin.export.onnx_file.float_model import float_graph  # noqa: E402


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.same(x)).mean((2, 3)))


def network():
    torch.manual_seed(0)
    return randomize(Residual()).eval()


X = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph():
    """The float model's, which takes the exporter a second: files of all plans are made of it."""
    return float_graph(network(), (X,), ({0: torch.export.Dim("batch")},), ["x"])


def quantized(activation, weight="int8 per_channel"):
    net = network()
    prepare(net, QuantPlan([Rule("*", weight=weight, input=activation)]))
    calibrate(net, [X])
    return net


def parameters(path):
    """Type and value of the zero points of activations."""
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [constants[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    values = [int(v) for tensor in found for v in onnx.numpy_helper.to_array(tensor).reshape(-1)]
    return {tensor.data_type for tensor in found}, set(values)


def run(path):
    return onnx_session(path, threads=1).run(None, {"x": X.numpy()})[0]


#: Biases are rounded to steps of input scale times weight scale, which may move an activation to the next level.
BIASES = 2e-3


def assert_alike(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        ("int8", "INT8"),
        ("int6 narrow", "INT8"),
        ("uint7", "INT8"),  # the half of int8 from zero up
        ("int8 per_channel", "INT8"),
        ("int12", "INT16"),
    ],
)
def test_the_numbers_are_those_of_the_model(activation, kind, graph, tmp_path):
    net = quantized(activation)
    export_onnx(net, (X,), tmp_path / "net.onnx", exported=graph, signed=True)
    assert parameters(tmp_path / "net.onnx") == ({getattr(onnx.TensorProto, kind)}, {0})
    assert_alike(run(tmp_path / "net.onnx"), net(X).detach().numpy(), BIASES)
    export_onnx(net, (X,), tmp_path / "unsigned.onnx", exported=graph)
    assert parameters(tmp_path / "unsigned.onnx")[0] == {getattr(onnx.TensorProto, f"U{kind}")}
    assert_alike(run(tmp_path / "net.onnx"), run(tmp_path / "unsigned.onnx"), 1e-6)


def test_weights_move_to_unsigned_integers_next_to_signed_inputs(graph, tmp_path, monkeypatch):
    """The processor is taken for one whose sums of signed products saturate."""
    net = quantized("int8")
    export_onnx(net, (X,), tmp_path / "net.onnx", exported=graph, signed=True)
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    assert_alike(run(tmp_path / "net.onnx"), net(X).detach().numpy(), BIASES)


def test_residual_sums_are_signed_as_well(graph, tmp_path):
    net = quantized("int8")
    export_onnx(net, (X,), tmp_path / "net.onnx", exported=graph, signed=True, sums_from=[X])
    model = onnx.load(tmp_path / "net.onnx")
    added = [name for node in model.graph.node if node.op_type == "Add" for name in node.input]
    made = {node.output[0]: node.op_type for node in model.graph.node}
    assert [made.get(name) for name in added[:2]] == ["DequantizeLinear", "DequantizeLinear"]
    assert parameters(tmp_path / "net.onnx") == ({onnx.TensorProto.INT8}, {0})
    assert_alike(run(tmp_path / "net.onnx"), net(X).detach().numpy(), 0.02)


@pytest.mark.parametrize(
    ("activation", "nearest"),
    [("uint8", "int8"), ("uint8 affine mse", "int8 mse"), ("int8 affine", "int8"), ("uint8 pact", "uint7 pact")],
)
def test_what_has_other_zero_points_is_refused_with_the_nearest_spec(activation, nearest, tmp_path):
    net = network()
    prepare(net, QuantPlan([Rule("stem", weight="int8", input=activation)]))
    reason = "activations are signed integers with zero point 0"
    message = f"stem.input ({activation}): {reason}; the nearest that fits is '{nearest}'"
    # Before any data.
    assert message in TARGETS["onnx"].faults(Request({"signed": True}, model=net))
    assert message not in TARGETS["onnx"].faults(Request({"signed": False}, model=net))
    prepare(again := network(), QuantPlan([Rule("stem", weight="int8", input=nearest)]))
    assert not TARGETS["onnx"].faults(Request({"signed": True}, model=again))


def test_the_option_is_true_or_false(tmp_path):
    with pytest.raises(ExportError, match="signed is true or false, got 'yes'"):
        export_model(Residual(), tmp_path / "net.onnx", (X,), signed="yes")
