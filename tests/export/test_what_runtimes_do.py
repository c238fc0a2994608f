"""Rows of examples/runtimes.md that are nobody's fault, and what our files and sessions make of them."""

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers import make_weight_quantizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session  # noqa: E402
from lq_plugin.export.target import TARGETS  # noqa: E402


def test_a_zero_point_for_each_output_channel_is_computed_with_integers(tmp_path):
    """ONNX Runtime's documentation of QLinearConv speaks of one zero point; the kernel has one for each channel."""
    import onnxruntime

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[0].weight += torch.linspace(-1, 1, 8).view(-1, 1, 1, 1)
    x = torch.rand(4, 3, 6, 6)
    prepare(net, "uint8 affine per_channel / uint8 affine")
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    left = onnx.load(tmp_path / "optimized.onnx")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in left.graph.initializer}
    integer = [node for node in left.graph.node if node.op_type == "QLinearConv"]
    assert any(len(set(constants[node.input[5]].reshape(-1).tolist())) > 1 for node in integer)
    want = net(x).detach().numpy()
    (got,) = onnx_session(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


def test_openvino_rounds_float_layers_to_bfloat16_unless_it_is_told_not_to(tmp_path):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(256, 64)).eval(), torch.randn(16, 256)
    prepare(net, "mxfp8")
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    want = net(x).detach().numpy()
    default = core.compile_model(str(tmp_path / "net.onnx"), "CPU")(x.numpy())[0]
    (ours,) = OpenVINOSession(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})
    scale = np.abs(want).max()
    assert np.abs(ours - want).max() < 1e-5 * scale
    assert np.abs(default - want).max() > 1e-3 * scale


def test_onnx_runtime_rounds_float_inputs_of_4_bit_weights_unless_it_is_told_not_to(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(5, 64)
    x[:, 3] = 100.0
    prepare(net, "int4 group32")
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    want = net(x).detach().numpy()
    default = onnxruntime.InferenceSession(str(tmp_path / "net.onnx")).run(None, {"x": x.numpy()})[0]
    (ours,) = onnx_session(tmp_path / "net.onnx", threads=1).run(None, {"x": x.numpy()})
    scale = np.abs(want).max()
    assert np.abs(ours - want).max() < 1e-5 * scale
    assert np.abs(default - want).max() > 1e-2 * scale


@pytest.mark.parametrize("activation", ["uint8 affine", "uint8 affine dynamic"])
@pytest.mark.parametrize("weight", ["int8 per_channel", "int4 per_channel", "twn"])
@pytest.mark.parametrize(("bias", "dims"), [(True, 2), (False, 2), (True, 3)])
def test_linear_layers_between_bytes_are_integer_kernels(bias, dims, weight, activation, tmp_path):
    """ONNX Runtime wants a zero point at the weight of a Gemm, no float bias, and bytes; the file stays small."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 6, bias)).eval(), torch.randn(5, 3, 64)[:, 0 if dims == 2 else slice(None)]
    prepare(net, QuantPlan([Rule("*", weight=weight, input=activation)]))
    calibrate(net, [x])
    path = tmp_path / "net.onnx"
    export_onnx(net, (x,), path)
    products = TARGETS["onnx"].products(path, "onnxruntime")
    assert not products.floating
    assert sum(products.integer.values()) == 1
    held = {tensor.name: len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer}
    assert held["0.weight_codes"] == 64 * 6 * {"int8": 8, "int4": 4, "twn": 2}[weight.split()[0]] // 8
    layer = net[0]
    w = layer.quantized_weight().detach().double()
    want = layer.quantized_input(x).detach().double() @ w.T + (layer.bias.detach().double() if bias else 0)
    # A bias next to bytes is int32 in steps of input scale times weight scale.
    step = (
        0.02 * float(w.abs().max()) / 127
        if bias and weight == "int8 per_channel" and "dynamic" not in activation
        else 0
    )
    found = onnx_session(path, threads=1).run(None, {onnx.load(path).graph.input[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, want.numpy(), atol=2e-6 + step)


def test_numbers_that_a_small_float_does_not_have():
    """torch saturates and rounds up; ml_dtypes, which onnx uses, makes NaN. Our codes are those of numbers."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    big, zero = torch.tensor([500.0]), torch.tensor([0.0])
    assert big.to(torch.float8_e4m3fn).float().item() == 448
    assert zero.to(torch.float8_e8m0fnu).float().item() == 2.0**-127
    assert np.isnan(big.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).all()
    assert np.isnan(zero.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)).all()
    weight = torch.zeros(4, 32)
    weight[1, 3] = 500.0
    for spec in ("mxfp8", "mxfp4", "nvfp4"):
        values = make_weight_quantizer(QuantSpec.parse(spec), "weight", (4, 32))(weight)
        assert values.isfinite().all()
        assert not values[0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_weight_of_zeros_in_nvfp4():
    """NaN in torchao with the tensor's scale, zeros in ours."""
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = torch.zeros(16, 32)
    theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    assert theirs.dequantize(torch.float32).isnan().all()
    ours = make_weight_quantizer(QuantSpec("nvfp4"), "weight", (16, 32))(weight)
    assert torch.equal(ours, weight)
