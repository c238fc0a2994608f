"""Files say what ONNX Runtime would otherwise do on its own: any session computes what the graph says."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import calibrate, prepare
from tests.models import randomize

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session  # noqa: E402
from lq_plugin.export.onnx_file.biases import settle_biases  # noqa: E402

SHAPES = {"Conv": [2, 8, 3, 3], "ConvTranspose": [2, 8, 3, 3], "Gemm": [4, 8], "MatMul": [2, 3, 8]}
#: One that rounds more finely than any error that is looked for here.
FINE = np.float32(2e-4)


def plain(model, threads=1):
    """A session as anyone opens it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def product(kind, scale, bias=True, relu=False, quantized_after=True):
    """x → Q → DQ → kind(·, 4 channels) → Q → DQ. `scale`: of the weight, `[4]` or `[]`; None: it is float."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (4, 8)).astype(np.int8)
    layout = {"Conv": codes.reshape(4, 8, 1, 1), "ConvTranspose": codes.T.reshape(8, 4, 1, 1)}.get(kind, codes.T).copy()
    axis = 0 if kind == "Conv" else 1
    constants = {"xs": np.float32(0.02), "xz": np.uint8(128), "ys": FINE, "yz": np.uint16(2**15)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
    ]
    if scale is None:
        # Channels of different size: one scale for all would round the small ones to nothing.
        sizes = np.array([1, 0.01, 0.001, 1], np.float32).reshape(
            [-1 if dim == axis else 1 for dim in range(layout.ndim)]
        )
        constants["w"] = layout.astype(np.float32) / 127 * sizes
    else:
        constants |= {"c": layout, "s": np.asarray(scale, np.float32)}
        nodes.append(
            helper.make_node("DequantizeLinear", ["c", "s"], ["w"], **({"axis": axis} if np.ndim(scale) else {}))
        )
    values = np.array([0.5, -0.5, 0.25, 1.0], np.float32)
    if kind == "MatMul" or not bias:
        nodes.append(helper.make_node(kind, ["d", "w"], ["product" if bias else "y"], "the product"))
    else:
        nodes.append(
            helper.make_node(
                kind, ["d", "w", "b"], ["y"], "the product", **({"strides": [1, 1]} if "Conv" in kind else {})
            )
        )
    if kind == "MatMul" and bias:
        nodes.append(helper.make_node("Add", ["product", "b"], ["y"]))
    if bias:
        constants["b"] = values
    result = "y"
    if relu:
        nodes.append(helper.make_node("Relu", ["y"], ["r"]))
        result = "r"
    if quantized_after:
        nodes.append(helper.make_node("QuantizeLinear", [result, "ys", "yz"], ["yq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["out"]))
        result = "out"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPES[kind])]
    outputs = [helper.make_tensor_value_info(result, TensorProto.FLOAT, [None] * len(SHAPES[kind]))]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "product", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def check_settled(model, shape, tolerance=2 * FINE):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (want,) = ReferenceEvaluator(model).run(None, {"x": x})
    moved = settle_biases(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(plain(model).run(None, {"x": x})[0], want, atol=tolerance)
    np.testing.assert_allclose(
        onnx_session(model.SerializeToString(), threads=1).run(None, {"x": x})[0], want, atol=tolerance
    )
    return moved


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("scale", [[0.01, 0.01, 0.01, 1e-12], 1e-12])
@pytest.mark.parametrize("kind", SHAPES)
def test_biases_that_do_not_fit_are_added_in_float(kind, scale, relu):
    model = product(kind, scale, relu=relu)
    assert check_settled(model, SHAPES[kind]) == ["b"]


@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
def test_a_sum_of_products_and_bias_stays_in_int32(kind):
    """The bias alone would fit: 2³¹ - 20 steps, and products of several thousand."""
    model = product(kind, [0.01, 0.01, 0.01, 1 / 0.02 / (2**31 - 20)])
    assert check_settled(model, SHAPES[kind]) == ["b"]


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Gemm"])
def test_biases_that_fit_are_integers(kind):
    model = product(kind, [0.01, 0.02, 0.005, 0.01])
    assert check_settled(model, SHAPES[kind], tolerance=2 * FINE + 0.02 * 0.02 / 2) == []
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "b_codes"]
    step = np.array([0.01, 0.02, 0.005, 0.01]) * 0.02
    np.testing.assert_array_equal(
        numpy_helper.to_array(bias), np.rint(np.array([0.5, -0.5, 0.25, 1.0]) / step).astype(np.int32)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_float_weights_stay_float(kind, bias):
    assert check_settled(product(kind, None, bias), SHAPES[kind]) == []


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "MatMul"])
def test_nothing_changes_where_nothing_is_quantized_afterwards(kind):
    model = product(kind, [0.01, 0.01, 0.01, 1e-12], quantized_after=False)
    before = [node.SerializeToString() for node in model.graph.node]
    assert check_settled(model, SHAPES[kind], tolerance=1e-5) == []
    assert [node.SerializeToString() for node in model.graph.node] == before


def check_file(net, x, path, tolerance, openvino=True):
    export_onnx(net.eval(), (x,), path, input_names=["x"])
    want = net(x).detach().numpy()
    sessions = [plain(path), onnx_session(path, threads=1)]
    if openvino:
        pytest.importorskip("openvino")
        sessions.append(OpenVINOSession(path, threads=1))
    for session in sessions:
        assert np.abs(session.run(None, {"x": x.numpy()})[0] - want).max() <= tolerance * np.abs(want).max(), type(
            session
        )


class Switched(nn.Module):
    """Filters of zeros, a batch norm that has switched a channel off, and a row of zeros; each with a bias that is not
    small."""

    def __init__(self):
        super().__init__()
        self.conv, self.normed, self.depthwise = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 8, 1),
            nn.Conv2d(8, 8, 3, groups=8),
        )
        self.norm, self.fc, self.nothing, self.last = (
            nn.BatchNorm2d(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )
        randomize(self)
        with torch.no_grad():
            for layer in (self.conv, self.depthwise, self.fc):
                layer.weight[3], layer.bias[3] = 0, 1.0
            self.norm.weight[2], self.norm.bias[2] = 1e-6, 1.0
            self.nothing.weight.zero_()
            self.nothing.bias.copy_(torch.linspace(-1, 1, 8))

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.norm(self.normed(torch.relu(self.conv(x)))))))
        x = torch.relu(self.fc(x.mean((2, 3))))
        return self.last(torch.relu(x + self.nothing(x)))


def test_channels_of_zeros_are_their_biases(tmp_path, caplog):
    torch.manual_seed(0)
    net, x = Switched(), torch.randn(6, 3, 8, 8)
    prepare(net, "w8a8")
    calibrate(net, [x])
    with caplog.at_level("WARNING", "lq_plugin.export.onnx_file.write"):
        check_file(net, x, tmp_path / "net.onnx", tolerance=0.005)
    # Of weights that are 0 the scale says nothing, and the bias fits. Of tiny ones it does.
    assert [record.args for record in caplog.records] == [("normed.bias_folded",)]
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    scale, codes = tensors["conv.weight_scale"], tensors["conv.weight_codes"]
    assert not codes[3].any()
    assert scale[3] == np.sort(np.delete(scale, 3))[2]


def test_inputs_that_were_all_zero(tmp_path):
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(),
        torch.randn(16, 6),
    )
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    prepare(net, "w8a8")
    calibrate(net, [x])
    check_file(net, x, tmp_path / "net.onnx", tolerance=1e-5)
    with torch.no_grad():
        net[0].bias.fill_(1.0)  # alive now: what the model was not calibrated for passes as 0
    check_file(net, x, tmp_path / "net.onnx", tolerance=1e-5)


def test_sixteen_bits_on_both_sides(tmp_path):
    """Steps of 10⁻⁹: biases from 2 on are more than int32 holds."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval(), torch.rand(4, 3, 4, 4)
    with torch.no_grad():
        net[0].weight.mul_(0.1)
        net[0].bias.copy_(torch.tensor([5.0, -5.0, 3.0, 0.0]))
    prepare(net, "int16 per_channel / uint16 affine")
    calibrate(net, [x])
    check_file(net, x, tmp_path / "net.onnx", openvino=False, tolerance=1e-3)
