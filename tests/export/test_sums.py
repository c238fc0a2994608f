"""Residual sums in whole numbers, 2-bit containers, and both runtimes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from tests.models import randomize, resnet20

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session, verify  # noqa: E402


class Residual(nn.Module):
    """Shortcuts of every kind: of the same shape, sliced and zero-padded, through a convolution; pooling between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(x + self.same(x))
        x = F.relu(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        x = F.relu(self.wide(x) + self.shortcut(x))
        return self.fc(x.mean((2, 3)))


def quantized(net, x, weight="int8 per_channel mse", inputs="uint8 affine mse"):
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(net, [x])
    return net.eval()


def optimized(path, folder):
    """Operations that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("inputs", ["uint8 affine mse", "uint4 affine mse"])
def test_convolutions_and_sums_become_integer_kernels(inputs, tmp_path):
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(16, 3, 16, 16)
    quantized(net, x, inputs=inputs)
    export_onnx(net, (x,), tmp_path / "net.onnx", sums_from=[x])
    operations = optimized(tmp_path / "net.onnx", tmp_path)
    assert operations.count("QLinearAdd") == 3
    # Fewer levels than a byte has are clipped first, and a convolution whose output is clipped stays float.
    assert operations.count("QLinearConv") >= (5 if "8" in inputs else 4)
    y = net(x).detach().numpy()
    ours = onnx_session(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})[0]
    assert np.sqrt(np.square(ours - y).mean()) < (0.05 if "8" in inputs else 0.2) * y.std()


def test_without_calibration_data_the_file_rounds_what_the_plan_says(tmp_path):
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(4, 3, 16, 16)
    quantized(net, x)
    export_onnx(net, (x,), tmp_path / "net.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 5  # two of the six layers share their input
    with pytest.raises(ExportError, match="no batches"):
        export_onnx(net, (x,), tmp_path / "other.onnx", sums_from=[])
    assert not (tmp_path / "other.onnx").exists()


def test_slices_and_pads_move_the_whole_numbers(tmp_path):
    """ResNet-20's shortcuts: the sums' operands differ from the plan's by a rounding to 8 bits, nowhere more."""
    torch.manual_seed(0)
    net, x = randomize(resnet20(8)), torch.randn(8, 3, 32, 32)
    quantized(net, x)
    export_onnx(net, (x,), tmp_path / "net.onnx", sums_from=[x])
    graph = onnx.load(tmp_path / "net.onnx").graph
    producer = {name: node for node in graph.node for name in node.output}
    pads = [node for node in graph.node if node.op_type == "Pad"]
    assert pads
    for pad in pads:
        sliced = producer[pad.input[0]]
        while sliced.op_type == "Slice":
            sliced = producer[sliced.input[0]]
        assert sliced.op_type == "QuantizeLinear"
        assert pad.input[2] == sliced.input[2], "padding is the zero point"
    y = net(x).detach().numpy()
    ours = onnx_session(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})[0]
    assert np.sqrt(np.square(ours - y).mean()) < 0.05 * y.std()


def test_int2_container(tmp_path):
    net, x = (
        nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64, 64, bias=False), nn.Linear(64, 6)),
        torch.randn(2, 3, 3, 3),
    )
    quantized(net, x, "int2 per_channel mse", None)
    y = net(x).detach().numpy()
    sizes = {}
    for smallest in (2, 4, 8):
        path = tmp_path / f"{smallest}.onnx"
        sizes[smallest] = export_onnx(net, (x,), path, input_names=["x"], smallest=smallest)
        content = onnx.load(path)
        kinds = {t.name: t.data_type for t in content.graph.initializer if t.name.endswith("weight_codes")}
        names = {2: "INT2", 4: "INT4", 8: "INT8"}
        kind = getattr(onnx.TensorProto, names[smallest])
        # ONNX Runtime mixes up INT2 columns unless they are a multiple of 4: the last layer has 6.
        last = getattr(onnx.TensorProto, names[max(smallest, 4)])
        assert kinds == {"0.weight_codes": kind, "2.weight_codes": kind, "3.weight_codes": last}
        assert content.opset_import[0].version == (25 if smallest == 2 else 21)
        np.testing.assert_allclose(onnx_session(path).run(None, {"x": x.numpy()})[0], y, rtol=1e-4, atol=1e-5)
    assert sizes[2] < sizes[4] < sizes[8]
    with pytest.raises(ExportError, match="smallest is 2, 4 or 8 bits, got 3"):
        export_onnx(net, (x,), tmp_path / "3.onnx", smallest=3)


def test_an_old_onnx_has_no_int2(tmp_path, monkeypatch):
    from lq_plugin.export.onnx_file import graph

    monkeypatch.setitem(graph.TYPES, (2, True), None)
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    quantized(net, x, "int2 per_channel", None)
    with pytest.raises(
        ExportError, match=r"0\.weight: the installed onnx .* has no INT2; update it, or say smallest=4"
    ):
        export_onnx(net, (x,), tmp_path / "net.onnx")


def test_linear_weights_fuse_to_one_kernel(tmp_path):
    net, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64, bias=False), nn.Linear(64, 32)), torch.randn(2, 64)
    rules = [
        Rule("0", weight="int8 group32"),
        Rule("1", weight="int4 per_channel"),
        Rule("2", weight="int2 group32 mse"),
    ]
    prepare(net, QuantPlan(rules))
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx")
    assert optimized(tmp_path / "net.onnx", tmp_path) == ["MatMulNBits"] * 3


def test_openvino_reads_the_same_file(tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(8, 3, 16, 16)
    quantized(net, x, "int4 per_channel mse")
    export_onnx(net, (x,), tmp_path / "net.onnx", sums_from=[x])
    y = net(x).detach().numpy()
    for session in (OpenVINOSession(tmp_path / "net.onnx", threads=1), OpenVINOSession(tmp_path / "net.onnx", batch=8)):
        (ours,) = session.run(None, {"x": x.numpy()})
        assert np.abs(ours - y).max() < 0.1 * np.abs(y).max()
        again = ours.copy()
        session.run(None, {"x": -x.numpy()})
        np.testing.assert_array_equal(ours, again, "an answer changed after the next call")
    result = verify(net, tmp_path / "net.onnx", [x], runtime="openvino")
    assert result.samples == 8
    assert result.largest_difference < 0.1
    with pytest.raises(ExportError, match="Did you mean 'openvino'"):
        verify(net, tmp_path / "net.onnx", [x], runtime="openvno")
    with pytest.raises(ExportError, match="no such file"):
        OpenVINOSession(tmp_path / "missing.onnx")
    small = nn.Sequential(nn.Linear(8, 8))
    quantized(small, torch.randn(2, 8), "int2", None)
    export_onnx(small, (torch.randn(2, 8),), tmp_path / "int2.onnx")
    with pytest.raises(ExportError, match="has no INT2: export with smallest=4"):
        OpenVINOSession(tmp_path / "int2.onnx")


@pytest.mark.parametrize("inputs", ["int16", pytest.param("uint8 affine per_channel", marks=pytest.mark.slow)])
def test_a_sum_is_rounded_once_for_the_layer_that_reads_it(inputs, tmp_path):
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(8, 3, 16, 16)
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine"), Rule("down", input=inputs)]))
    calibrate(net, [x])
    export_onnx(net.eval(), (x,), tmp_path / "net.onnx", sums_from=[x])
    model = onnx.load(tmp_path / "net.onnx")
    real = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert not [node.name for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in real]
