"""Models in float16: their files hold half tensors, and what is quantized between them is float32, as in the model."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.export import verify
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS
from tests.models import randomize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, numpy_helper  # noqa: E402

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session  # noqa: E402
from lq_plugin.export.onnx_file.float_model import float_graph  # noqa: E402


class Net(nn.Module):
    """Convolutions, a batch norm, a residual sum, a float layer norm, linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise, self.same = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
        self.wide, self.head = nn.Linear(16, 32), nn.Linear(32, 6, bias=False)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = (x + self.depthwise(x)).mean((2, 3))
        return self.head(F.gelu(self.wide(self.same(x))))


X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0)).half()


def network():
    torch.manual_seed(0)
    return randomize(Net()).eval().half()


@pytest.fixture(scope="module")
def graph():
    return float_graph(network(), (X,), ({0: torch.export.Dim("batch")},), ["x"])


def quantized(weight, inputs=None, rules=()):
    net = network()
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs), *rules]))
    calibrate(net, [X])
    return net


PLANS = {
    "int8": ("int8 per_channel", "uint8 affine"),
    "int4 groups": ("int4 group16 ragged", None),
    "fewer levels": ("int4 per_channel", "uint5 affine"),
    "a scale for each channel": ("int8 per_channel", "int8 per_channel"),
    "codebook": ("kmeans4", None),
    "fp8": ("mxfp8", None),
    "fp4": ("nvfp4", None),
}


@pytest.mark.parametrize("plan", PLANS)
def test_runtimes_compute_what_the_model_does(plan, graph, tmp_path):
    pytest.importorskip("openvino")
    net, path = quantized(*PLANS[plan]), tmp_path / "net.onnx"
    export_onnx(net, (X,), path, exported=graph, fp4="uint4")
    want = net(X).detach().numpy()
    assert want.dtype == np.float16
    scale = float(np.abs(want).max())
    openvino = [] if "ragged" in str(PLANS[plan]) else [OpenVINOSession(path, threads=1)]
    for session in (onnx_session(path, threads=1), *openvino):
        (got,) = session.run(None, {"x": X.numpy()})
        assert got.dtype == np.float16
        # Half sums differ in their last bits, which may move an activation to the next level.
        errors = np.abs(got.astype(np.float32) - want.astype(np.float32)) / scale
        assert np.median(errors) < 2e-3
        assert errors.max() < 0.05


def test_the_file_is_half_but_for_scales_which_are_exact(graph, tmp_path):
    net = quantized("int8 per_channel", "uint8 affine", [Rule("wide", weight="float", input="float")])
    export_onnx(net, (X,), tmp_path / "net.onnx", exported=graph)
    model = onnx.load(tmp_path / "net.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    assert constants["wide.weight"].data_type == TensorProto.FLOAT16
    floats = {name for name, tensor in constants.items() if tensor.data_type == TensorProto.FLOAT}
    assert floats
    assert all(name.endswith("_scale") for name in floats)
    scale, _ = net.head.input_quantizer.qparams()
    kept = [numpy_helper.to_array(constants[name]) for name in floats]
    assert any(value.ndim == 0 and value == scale.item() for value in kept)
    assert scale.item() != float(np.float16(scale.item()))  # a half scale would be another one


def test_openvino_computes_integers_between_half_tensors(graph, tmp_path):
    pytest.importorskip("openvino")
    export_onnx(quantized("int8 per_channel", "uint8 affine"), (X,), tmp_path / "net.onnx", exported=graph)
    compiled = OpenVINOSession(tmp_path / "net.onnx", threads=1).compiled
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(node["layerType"].astype(str), node["runtimePrecision"].astype(str)) for node in nodes]
    products = [precision for kind, precision in kinds if kind in ("Convolution", "FullyConnected")]
    assert sorted(set(products)) in (["u8"], ["i8", "u8"])
    assert len(products) == 4


def test_one_layer_is_the_arithmetic_of_its_numbers(tmp_path):
    """A linear layer by numpy: levels from float32 scales, a product rounded to half once."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 8, bias=False)).half().eval(), torch.randn(40, 24).half()
    prepare(net, "int8 per_channel / uint8 affine")
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    (scale,) = [v for name, v in constants.items() if name.endswith("_scale") and v.ndim == 0]
    (zero,) = [v for name, v in constants.items() if name.endswith("_zero_point") and v.ndim == 0]
    levels = np.clip(np.rint(x.numpy().astype(np.float32) / scale) + zero.astype(np.float32), 0, 255)
    read = ((levels - zero.astype(np.float32)) * scale).astype(np.float16)
    weight = (constants["0.weight_codes"] * constants["0.weight_scale"]).astype(np.float16)  # [C_in, C_out]
    want = read.astype(np.float64) @ weight.astype(np.float64)
    (got,) = onnx_session(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2**-10, atol=1e-3)
    assert verify(net, tmp_path / "net.onnx", [x]).agreement == 1.0


def test_tensorrt_is_float32():
    faults = TARGETS["tensorrt"].faults(Request(model=quantized("int8 per_channel", "int8")))
    assert len(faults) == 1
    assert "float16 (stem.weight, 11 of 11 parameters): this file is float32; call model.float()" in faults[0]
