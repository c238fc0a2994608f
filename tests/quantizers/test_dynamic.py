"""Dynamic ranges against ONNX Runtime, numpy row by row, and what they promise: nothing calibrated, nothing kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lq_plugin import PlanError, QuantPlan, QuantSpec, Rule, SpecError, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model, load_packed, save_packed, use_torchao
from lq_plugin.model.calibrate import needs_data
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.fidelity import layer_fidelity
from lq_plugin.quantizers import make_activation_quantizer
from lq_plugin.report.defaults import default_rows


def quantizer(spec: str, channels: int = 8, axis: int = -1):
    return make_activation_quantizer(QuantSpec.parse(spec), "x", channels, axis)


def by_hand(x: np.ndarray, low: int, high: int, affine: bool = False) -> np.ndarray:
    """One row that shares a scale, in float32, an operation at a time."""
    x = x.astype(np.float32)
    least, most = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    if least == most or (low == 0 and most == 0 and not affine):
        return x * np.float32(0)
    if affine:
        scale = (most - least) / np.float32(high - low)
        zero = np.rint(np.clip(low - least / scale, low, high))
    else:
        scale = most / np.float32(high) if low == 0 else max(most / np.float32(high), least / np.float32(low))
        zero = np.float32(0)
    return (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale


@pytest.fixture(scope="module")
def dynamic_quantize_linear():
    """ONNX's operator and its inverse, in ONNX Runtime."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, ["n"])], [helper.make_tensor_value_info("y", kind, ["n"])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=300),
    shift=st.sampled_from([0.0, 1e6, -1e6]),
)
def test_unsigned_with_a_zero_point_is_the_operator_of_onnx(dynamic_quantize_linear, rows, shift) -> None:
    x = torch.tensor(rows) + shift
    np.testing.assert_array_equal(quantizer("uint8 affine dynamic")(x).numpy(), dynamic_quantize_linear(x))


@pytest.mark.parametrize("make", [torch.randn, torch.rand, lambda n: -torch.rand(n), torch.zeros])
def test_large_tensors_are_those_of_onnx(dynamic_quantize_linear, make) -> None:
    torch.manual_seed(0)
    x = make(20001)
    x[::3] = (x[::3] * 32).round() / 32  # quotients between two levels
    x[0] = 255 / 64 if x.any() else 0.0
    np.testing.assert_array_equal(quantizer("uint8 affine dynamic")(x).numpy(), dynamic_quantize_linear(x))


GRIDS = {
    "int8": (-128, 127, False),
    "int4 narrow": (-7, 7, False),
    "uint4": (0, 15, False),
    "int6 affine": (-32, 31, True),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_granularity_equals_the_formula_by_hand(grid: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8) * torch.exp(2 * torch.randn(3, 5, 1))
    x[1, 2] = 0.0
    low, high, affine = GRIDS[grid]

    def rows(part: np.ndarray) -> np.ndarray:
        return np.stack([by_hand(row, low, high, affine) for row in part])

    array = x.numpy()
    np.testing.assert_array_equal(quantizer(f"{grid} dynamic")(x), by_hand(array, low, high, affine))
    tokens = rows(array.reshape(15, 8)).reshape(3, 5, 8)
    np.testing.assert_array_equal(quantizer(f"{grid} per_token dynamic")(x), tokens)
    groups = rows(array.reshape(30, 4)).reshape(3, 5, 8)
    np.testing.assert_array_equal(quantizer(f"{grid} group4 dynamic")(x), groups)
    channels = rows(array.reshape(15, 8).T).T.reshape(3, 5, 8)
    np.testing.assert_array_equal(quantizer(f"{grid} per_channel dynamic")(x), channels)
    image = x.reshape(1, 15, 8).movedim(-1, 1).unsqueeze(-1)  # groups of channels of a convolution's input
    got = quantizer(f"{grid} group4 dynamic", axis=1)(image)
    np.testing.assert_array_equal(got.squeeze(-1).movedim(1, -1).reshape(3, 5, 8), groups)


def test_a_group_may_be_shorter_and_low_precision_is_kept() -> None:
    x = torch.randn(4, 10)
    got = quantizer("int8 group4 ragged dynamic", 10)(x)
    assert torch.equal(got[:, 8:], quantizer("int8 per_token dynamic", 2)(x[:, 8:]))
    half = quantizer("uint8 affine dynamic")(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, quantizer("uint8 affine dynamic")(x.bfloat16().float()).bfloat16())


def test_the_gradient_passes_where_there_are_levels() -> None:
    x = torch.tensor([[-1.0, 0.3, 2.0], [4.0, 0.0, -3.0]], requires_grad=True)
    quantizer("uint8 per_token dynamic", 3)(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    x.grad = None
    quantizer("int8 per_token dynamic", 3)(x).sum().backward()
    assert x.grad.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    "plan", ["w4a8 dynamic", "w4 group8 a8 dynamic", "w8a8 per_token dynamic", "fp8 / fp8 dynamic"]
)
def test_nothing_is_calibrated_or_kept(plan: str, tmp_path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    net, x = make(), torch.randn(7, 16)
    prepare(net, plan)
    assert not needs_data(net)
    assert net[0].input_quantizer.is_calibrated
    y = net.eval()(x)
    assert torch.equal(net.train()(x), y), "training computes what evaluation does"
    keys = {key for key in net.state_dict() if "input_quantizer" in key}
    assert {key.rpartition(".")[2] for key in keys} == {"enabled", "calibrated"}
    calibrate(net, ())
    calibrate(net, [100 * x])
    assert torch.equal(net.eval()(x), y), "no data changes it"
    (row,) = [row for row in layer_fidelity(net, lambda: net(x)) if (row.layer, row.slot) == ("0", "input")]
    assert row.sqnr_db > 25
    assert row.minimum is None
    assert cost(net)["0"].input_bits == 8
    save_packed(net, tmp_path / "net.safetensors")
    other = make()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), y)


def test_the_short_plan() -> None:
    rule = QuantPlan.parse("w4 group32 a8 dynamic").rules[0]
    assert (str(rule.weight), str(rule.input)) == ("int4 group32", "uint8 affine dynamic")
    assert str(QuantPlan.parse("w4a8 per_token dynamic").rules[0].input) == "uint8 per_token affine dynamic"
    assert ("`a8 dynamic`", "0..255", "tensor", "yes", "dynamic", "nearest, clipped") in default_rows()


def test_what_does_not_fit_is_refused() -> None:
    for spec, words in {
        "int8 per_token": "write 'per_token dynamic', got 'minmax'",
        "mxfp4 dynamic": "has no choice of range",
        "int8 group16:4 dynamic": "range 'dynamic' has float scales, got integer ones: group16:4",
        "int8 dynamic mad": "has the clipped gradient, got 'mad'",
        "int8 dynamic:3": "range 'dynamic' takes no option",
    }.items():
        with pytest.raises(SpecError, match=words):
            QuantSpec.parse(spec)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(PlanError, match="weight range 'dynamic' is for activations"):
        prepare(net, "int8 dynamic")
    with pytest.raises(PlanError, match="per_token is of layers with their channels last, these are on axis -3"):
        prepare(net, "int8 / int8 per_token dynamic")


def test_targets_without_ranges_at_run_time_refuse(tmp_path) -> None:
    net, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
    prepare(net, "int8 per_channel / int8 dynamic")
    with pytest.raises(
        ExportError,
        match=r"0\.input .*DynamicQuantizeLinear has unsigned .*nearest that fits is 'uint8 affine dynamic'",
    ):
        export_model(net, tmp_path / "net.onnx", (x,), target="onnx")
    with pytest.raises(ExportError, match=r"0\.input .*its range is found at run time, these files hold fixed ones"):
        export_model(net, tmp_path / "net.onnx", (x,), target="tensorrt")
    calibrate(net, ())
    with pytest.raises(ExportError, match="and torchao gets fixed ranges here"):
        use_torchao(net)


def test_values_without_a_level_are_told(caplog) -> None:
    net = nn.Sequential(nn.Linear(16, 4))
    prepare(net, "int8 / uint8 dynamic")
    calibrate(net, [torch.randn(100, 16)])
    assert "of its values are negative and become 0" in caplog.text


def test_it_trains() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel", input="int4 per_token dynamic")]))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net.train()(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
