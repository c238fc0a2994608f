"""The integer forward pass against fake quantization, and against exact sums in float64."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lq_plugin import QuantPlan, Rule, prepare, remove
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.layers.integer import (
    disable_integer_forward,
    enable_integer_forward,
    integer_choices,
    integer_report,
    settle_integer_forward,
)
from lq_plugin.layers.integer.kernels import IntegerKernels, integer_kernels, sums_exactly
from lq_plugin.model import calibrate, quantizers
from lq_plugin.native import use_native
from lq_plugin.quantizers import ActivationQuantizer

needs_kernels = pytest.mark.skipif(isinstance(integer_kernels(), str), reason=str(integer_kernels()))
#: Without VNNI, products of 8 bits saturate in torch, and those of 7 are computed with integers.
BITS = 8 if sums_exactly(127) else 7
W8A8 = f"int{BITS} per_channel / uint8 affine ema"


def prepared(model, plan, *batches):
    weight, inputs = plan.split(" / ")
    prepare(model, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(model, list(batches))
    for quantizer in quantizers(model):
        quantizer.observing = isinstance(quantizer, ActivationQuantizer)
    return model.train()


def step(model, x):
    """Output, gradients of input and parameters, and what the observers saw."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    generator = torch.Generator().manual_seed(3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], torch.randn(y.shape, generator=generator))
    seen = [value.clone() for q in quantizers(model) if hasattr(q, "batch_min") for value in (q.batch_min, q.batch_max)]
    return y.detach(), dict(zip(("x", *names), gradients, strict=True)), seen


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-12)


def assert_same_step(model, x):
    y, gradients, seen = step(model, x)
    integer = copy.deepcopy(model)
    for quantizer in quantizers(integer):
        if hasattr(quantizer, "batch_min"):
            quantizer.batch_min.fill_(torch.inf)
            quantizer.batch_max.fill_(-torch.inf)
    enable_integer_forward(integer, True)
    assert set(integer_report(integer).values()) == {"integer"}
    y2, gradients2, seen2 = step(integer, x)
    assert set(integer_report(integer).values()) == {"integer"}
    assert_close(y2, y)
    for name, gradient in gradients.items():
        assert_close(gradients2[name], gradient)
    assert all(map(torch.equal, seen2, seen))


inputs_of = st.sampled_from(
    ["uint{} affine ema", "int{} ema", "uint{} minmax", "int{} affine percentile:90", "uint{} affine mse"]
)
weights_of = st.sampled_from(["int{} per_channel", "int{}", "int{} per_channel mse", "int{} percentile:80"])


@needs_kernels
@given(
    weights_of, inputs_of, st.integers(2, BITS), st.integers(2, 8), st.integers(0, 99), st.booleans(), st.booleans(),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)), st.integers(9, 13), st.integers(9, 11),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_convolution(weight, inputs, weight_bits, input_bits, seed, bias, channels_last, sizes, strides, height, width):
    n, c_in, c_out, kh, kw, padding = sizes
    stride, dilation, groups = strides
    if c_in == 1:
        groups = 1
    torch.manual_seed(seed)
    conv = nn.Conv2d(
        2 * c_in * groups,
        c_out * groups,
        (kh, kw),
        (stride, 1),
        (padding, padding // 2),
        (dilation, 1),
        groups=groups,
        bias=bias,
    )
    x = torch.randn(n, 2 * c_in * groups, height, width) * torch.rand(()).add(0.1) + torch.rand(())
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    model = prepared(nn.Sequential(conv), f"{weight.format(weight_bits)} / {inputs.format(input_bits)}", x)
    # Beyond the calibrated range something is clipped.
    assert_same_step(model, x * 1.3)


@needs_kernels
@given(
    weights_of, inputs_of, st.integers(2, BITS), st.integers(2, 8), st.integers(0, 99), st.booleans(),
    st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 70), st.integers(1, 40),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_linear(weight, inputs, weight_bits, input_bits, seed, bias, shape, c_in, c_out):
    torch.manual_seed(seed)
    x = torch.randn(*shape, c_in) + 0.4
    model = prepared(
        nn.Sequential(nn.Linear(c_in, c_out, bias)), f"{weight.format(weight_bits)} / {inputs.format(input_bits)}", x
    )
    assert_same_step(model, x * 1.3)


@needs_kernels
def test_padding_stands_for_zero():
    torch.manual_seed(0)
    x = torch.rand(2, 8, 5, 5) * 3 - 1  # zero lies inside of the levels
    model = prepared(nn.Sequential(nn.Conv2d(8, 4, 5, padding=4)), W8A8, x)
    enable_integer_forward(model, True)
    layer = model[0]
    scale, zero_point = layer.input_quantizer.qparams()
    assert 0 < zero_point.item() < 255
    q = ((x * scale.reciprocal()).round() + zero_point).clamp(0, 255)
    w = layer.quantized_weight().detach()
    exact = F.conv2d((q.double() - zero_point) * scale.double(), w.double(), layer.bias.detach().double(), padding=4)
    assert_close(model(x).detach().double(), exact, 1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "grid", [IntegerGrid(0, 255, True), IntegerGrid(-128, 127), IntegerGrid(-7, 7), IntegerGrid(0, 3, True)]
)
def test_kernels_for_all_processors_agree(grid, dtype):
    """With each other and with torch, for lengths that no register divides."""
    torch.manual_seed(0)
    x = (torch.randn(100_003) * 2).to(dtype)
    x[7], x[11], x[200] = torch.inf, -torch.inf, 0.0
    z = 3.0 if grid.affine else 0.0
    found = []
    for variant in IntegerKernels().variants:
        kernels = IntegerKernels(variant)
        extremes = torch.tensor([torch.inf]), torch.tensor([-torch.inf])
        q, mask = kernels.quantize(x, 0.013, z, grid, True, extremes)
        gradient = torch.ones_like(x)
        kernels.keep(gradient, mask)
        rows = x[:99_990].nan_to_num(posinf=0.5, neginf=0.0).view(3, -1)
        scale = torch.empty(3)
        found.append([q, mask, *extremes, kernels.dequantize(q, 0.013, z, dtype), gradient])
        found[-1] += [kernels.quantize_weight(rows, scale, IntegerGrid(-7, 7), True), scale]
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
    assert torch.equal(found[0][4], ((found[0][0].float() - z) * torch.tensor(0.013)).to(dtype))
    rows = x[:99_990].float().nan_to_num(posinf=0.5, neginf=0.0).view(3, -1)
    scale = torch.maximum(rows.amax(1) / 7, rows.amin(1) / -7)
    assert torch.equal(found[0][7], scale)
    assert torch.equal(found[0][6].float(), (rows * scale.reciprocal()[:, None]).round().clamp(-7, 7))
    x = x.float()
    r = torch.round(x * torch.tensor(0.013).reciprocal()) + z
    assert torch.equal(found[0][0].float() + grid.quant_min, r.clamp(grid.quant_min, grid.quant_max))
    assert torch.equal(found[0][5].bool(), (r >= grid.quant_min) & (r <= grid.quant_max))


NARROW = [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16), ("bf16-true", torch.bfloat16)]


@needs_kernels
@pytest.mark.parametrize(("precision", "dtype"), NARROW)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_narrow_precisions_against_float64(kind, wide, precision, dtype):
    """The output is the exact one, rounded once; gradients are those of the levels, in the dtype of the output."""
    torch.manual_seed(0)
    module = nn.Linear(24, 7) if kind == "linear" else nn.Conv2d(8, 6, 3, padding=1)
    x = (torch.randn(5, 24) if kind == "linear" else torch.randn(2, 8, 6, 5)) + 0.3
    model = prepared(nn.Sequential(module), f"int{BITS} per_channel / uint8 affine ema", x)
    if precision == "bf16-true":
        model.bfloat16()
    x = (x * 1.3).to(torch.float32 if wide and precision != "bf16-true" else dtype)
    layer = model[0]
    w = layer.quantized_weight().detach().double()
    if precision == "bf16-true":  # the levels before they are rounded to the weight's dtype
        with torch.no_grad():
            w = layer.weight_quantizer(layer.weight.float()).double()
    grid, (scale, zero_point) = layer.input_quantizer.spec.grid, layer.input_quantizer.qparams()
    q = (x.float() * scale.reciprocal()).round() + zero_point
    inside = (q >= grid.quant_min) & (q <= grid.quant_max)
    levels = (q.clamp(grid.quant_min, grid.quant_max) - zero_point).double() * scale.double()
    product = F.linear if kind == "linear" else lambda *operands: F.conv2d(*operands, padding=1)
    exact = product(levels, w, layer.bias.detach().double())
    enable_integer_forward(model, True)
    given = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=precision.endswith("mixed")):
        y = model(given)
    assert integer_report(model) == {"0": "integer"}
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps
    assert ((y.detach().double() - exact).abs() <= 0.51 * step * exact.abs() + 1e-5).all()
    upstream = torch.randn(y.shape).to(dtype)
    y.backward(upstream)
    v, u = levels.to(dtype).double().requires_grad_(), w.to(dtype).double().requires_grad_()
    product(v, u, None).backward(upstream.double())
    for mine, wanted in ((given.grad, torch.where(inside, v.grad, 0.0)), (layer.weight.grad, u.grad)):
        assert ((mine.double() - wanted).abs() <= 2 * step * wanted.abs().max()).all()
    assert given.grad.dtype == x.dtype
    assert (given.grad == 0)[~inside].all()


@needs_kernels
@pytest.mark.parametrize(("precision", "dtype"), NARROW)
def test_narrow_precisions_beside_fake_quantization(precision, dtype):
    """A network's step: the same extremes, and differences no larger than the dtype's rounding makes them.

    A ReLU's input that is rounded to the other side of zero changes single gradients: whole tensors are compared.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    x = torch.randn(8, 8, 6, 6)
    model = prepared(net, W8A8, x)
    if precision == "bf16-true":
        model, x = model.bfloat16(), x.bfloat16()
    other = copy.deepcopy(model)
    enable_integer_forward(other, True)
    with torch.autocast("cpu", dtype, enabled=precision.endswith("mixed")):
        (y, gradients, seen), (y2, gradients2, seen2) = step(model, x), step(other, x)
    assert set(integer_report(other).values()) == {"integer"}
    assert y.dtype == y2.dtype == dtype
    assert_close(y2.float(), y.float(), 4 * torch.finfo(dtype).eps)
    for name, gradient in gradients.items():
        assert gradients2[name].dtype == gradient.dtype
        assert (gradients2[name] - gradient).float().norm() <= 8 * torch.finfo(dtype).eps * gradient.float().norm()
    # The extremes of the second layer's input are those of what the first one gives.
    assert all(map(torch.equal, seen2[:2], seen[:2]))
    assert_close(torch.stack(seen2), torch.stack(seen), 4 * torch.finfo(dtype).eps)


@needs_kernels
def test_what_is_kept_for_backward_is_a_quarter():
    x = torch.randn(64, 32, 16, 16, requires_grad=True)
    model = prepared(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), W8A8, x.detach())
    enable_integer_forward(model, True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        model(x)
    assert sum(kept) < 0.3 * x.numel() * 4


@needs_kernels
def test_a_nan_gets_through():
    x = torch.randn(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 3)), W8A8, x)
    enable_integer_forward(model, True)
    x[1, 2] = torch.nan
    assert model(x).isnan().any()
    assert model[0].input_quantizer.batch_min.isnan()
    assert "NaN" in integer_report(model)["0"]


@needs_kernels
@pytest.mark.parametrize(
    ("layer", "plan", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), W8A8, "depthwise"),
        (nn.Conv2d(8, 8, 3, padding="same"), W8A8, "padding"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), W8A8, "padding mode"),
        (nn.ConvTranspose2d(8, 8, 3), W8A8, "ConvTranspose2d"),
        (nn.Conv2d(8, 8, 3), "int8 per_channel lsq / uint8 affine ema", "quantized by"),
        (nn.Conv2d(8, 8, 3), "int8 per_channel / uint8 lsq", "quantized by"),
        (nn.Conv2d(8, 8, 3), "int8 affine / uint8 affine ema", "zero point"),
        (nn.Conv2d(8, 8, 3), "int4 group4 / uint8 affine ema", "scales"),
        (nn.Conv2d(8, 8, 3), "int8 / uint8 affine per_channel ema", "scales"),
        (nn.Conv2d(8, 8, 3), "int12 / uint8 affine ema", "8 bits"),
        (nn.Conv2d(8, 8, 3), "int8 stochastic / uint8 affine ema", "rounding"),
        (nn.Conv2d(8, 8, 3), "bwn / uint8 affine ema", "quantized by"),
    ],
)
def test_what_is_not_covered_says_why(layer, plan, reason):
    x = torch.randn(2, 8, 9, 9)
    model = prepared(nn.Sequential(layer), plan, x)
    expected = model(x).detach()
    enable_integer_forward(model, True)
    assert torch.equal(model(x).detach(), expected)
    assert reason in integer_report(model)["0"]
    assert integer_choices(model) == {}


@needs_kernels
@pytest.mark.parametrize(
    ("plan", "saturates"),
    [
        ("int8 per_channel / uint8 affine ema", True),
        ("int8 per_channel / uint7 affine ema", False),
        ("int7 per_channel / uint8 affine ema", False),
        ("int4 per_channel / uint8 affine ema", False),
    ],
)
def test_without_vnni_products_that_saturate_are_refused(plan, saturates, monkeypatch):
    monkeypatch.setattr("lq_plugin.layers.integer.arithmetic.sums_exactly", lambda weight: weight <= 64)
    model = prepared(nn.Sequential(nn.Linear(16, 3)), plan, torch.randn(4, 16))
    enable_integer_forward(model, True)
    assert ("no VNNI" in integer_report(model)["0"]) == saturates


@needs_kernels
@pytest.mark.parametrize("weight", [8, 7])
def test_the_largest_products(weight):
    """All products as large as they can be: where they saturate, they are not summed with integers."""
    linear = nn.Linear(64, 8, bias=False)
    nn.init.ones_(linear.weight)
    x = torch.ones(4, 64)
    model = prepared(nn.Sequential(linear), f"int{weight} per_channel / uint8 affine ema", x)
    want = model(x)
    enable_integer_forward(model, True)
    assert_close(model(x), want)


@needs_kernels
def test_calls_that_are_not_covered_are_named():
    x = torch.randn(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 3)), W8A8, x)
    expected = model(x).detach()
    enable_integer_forward(model, True)
    with use_native(False):
        assert torch.equal(model(x).detach(), expected)
    assert "switched off" in integer_report(model)["0"]
    assert model.double()(x.double()).dtype == torch.float64
    assert "it is in torch.float64" in integer_report(model.float())["0"]
    model[0].input_quantizer.set_enabled(False)
    disabled = model(x)
    assert_close(disabled.detach(), F.linear(x, model[0].quantized_weight(), model[0].bias).detach())
    assert "not quantized yet" in integer_report(model)["0"]


@needs_kernels
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_whole_graph_compiles_to_fake_quantization():
    x = torch.randn(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 3)), W8A8, x)
    expected = model(x).detach()
    enable_integer_forward(model, True)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(y.detach(), expected)
    assert "torch.compile" in integer_report(model)["0"]


@needs_kernels
def test_evaluation_remove_and_copies():
    x = torch.randn(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 30)), W8A8, x)
    keys = set(model.state_dict())
    evaluated = model.eval()(x).detach()
    enable_integer_forward(model, True)
    assert torch.equal(model(x).detach(), evaluated)
    assert set(model.state_dict()) == keys
    trained = model.train()(x).detach()
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model)))(x).detach(), trained)
    disable_integer_forward(model)
    assert integer_report(model) == {}
    enable_integer_forward(model, True)
    remove(model)
    assert type(model[0]) is nn.Linear
    assert "integer" not in vars(model[0])


@needs_kernels
def test_a_trial_chooses_once_and_leaves_no_trace():
    x = torch.randn(32, 256)
    model = prepared(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3)), W8A8, x)
    expected, gradients, seen = step(model, x)
    enable_integer_forward(model)
    y, tried, again = step(model, x)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, again, seen))
    assert all(torch.equal(tried[name], gradient) for name, gradient in gradients.items())
    assert settle_integer_forward(model, lambda mine: {"0": True, "2": False} if set(mine) == {"0", "2"} else {}) == [
        "0",
        "2",
    ]
    assert integer_choices(model) == {"0": True, "2": False}
    assert settle_integer_forward(model, lambda mine: pytest.fail("all have a choice")) == []
    assert integer_report(model)["0"].startswith("integer (")
    assert "slower" in integer_report(model)["2"]
    assert_close(step(model, x)[0], expected)
    other = prepared(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3)), W8A8, x)
    enable_integer_forward(other, integer_choices(model))
    assert integer_choices(other) == integer_choices(model)


@needs_kernels
def test_hooks_on_quantizers_see_their_calls_and_change_nothing():
    x = torch.randn(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 30)), W8A8, x)
    enable_integer_forward(model, True)
    expected = step(model, x)[0]
    calls = []
    for quantizer in quantizers(model):
        quantizer.register_forward_pre_hook(lambda module, args: calls.append(module.name))
    assert torch.equal(step(model, x)[0], expected)
    assert calls == ["0.weight", "0.input"]


@needs_kernels
def test_checkpointing_and_a_frozen_input():
    torch.manual_seed(1)
    x = torch.randn(4, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 30)), W8A8, x)
    enable_integer_forward(model, True)
    _, gradients, _ = step(model, x)
    held = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(model, held, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y, held, torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(gradient, gradients["x"])
    model(x).sum().backward()  # an input without gradient keeps no mask
    assert model[0].weight.grad is not None


@needs_kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_trial_within_gradient_checkpointing(reentrant):
    """The second run of a checkpoint has no trial, and saves what the first did."""
    x = torch.randn(32, 64)
    model = prepared(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), W8A8, x)

    def gradients(function):
        given = x.clone().requires_grad_()
        function(given).square().sum().backward()
        return [given.grad]

    expected = gradients(model)
    enable_integer_forward(model)
    for choice in (None, True, False):
        for found, wanted in zip(
            gradients(lambda given: checkpoint(model, given, use_reentrant=reentrant)), expected, strict=True
        ):
            assert_close(found, wanted)
        assert set(integer_choices(model).values()) == ({choice} - {None})
        settle_integer_forward(model, lambda mine: dict.fromkeys(mine, True))
        if choice:
            enable_integer_forward(model, False)
