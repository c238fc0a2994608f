"""Products that keep their input and round it again in the backward pass: numbers, gradients, and the bytes kept."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.model import commit_observers, quantizers
from lq_plugin.native import available, use_native
from lq_plugin.quantizers import ActivationQuantizer

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (4, 3, 12)),
    "without bias": (lambda: nn.Linear(12, 5, bias=False), (7, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, bias=False), (2, 4, 7, 9)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 7, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 7, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
}


def training(model, plan, x):
    prepare(model, QuantPlan([plan]) if isinstance(plan, Rule) else QuantPlan.parse(plan))
    calibrate(model, [x])
    model.train()
    for quantizer in quantizers(model):
        quantizer.observing = isinstance(quantizer, ActivationQuantizer)
    return model


def layer_of(kind, plan="w8a8"):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.randn(shape)
    # Beyond the calibrated range something is clipped.
    return training(nn.Sequential(make()), plan, x)[0], x * 1.3


def by_autograd(layer, x):
    """The product of what the quantizers give, of which autograd keeps both."""
    x, weight, bias = layer.quantized_input(x), layer.quantized_weight(), layer.bias
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def outcome(layer, forward, x):
    """Output, gradients of input and parameters, extremes."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    layer.input_quantizer.batch_min.fill_(torch.inf)
    layer.input_quantizer.batch_max.fill_(-torch.inf)
    with use_native(True):
        y = forward(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    seen = [layer.input_quantizer.batch_min.clone(), layer.input_quantizer.batch_max.clone()]
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *seen]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", LAYERS)
def test_numbers_are_those_of_autograd(kind, precision):
    """Bit for bit, in layout also, of contiguous and of channels-last images."""
    layer, x = layer_of(kind)
    dtype = {"bf16-mixed": BRAIN, "bf16-true": BRAIN, "16-mixed": HALF}.get(precision, SINGLE)
    if precision == "bf16-true":
        layer.bfloat16()
    with torch.autocast("cpu", dtype, enabled=precision.endswith("mixed")):
        for memory in (torch.contiguous_format, torch.channels_last):
            if memory is torch.channels_last and x.ndim != 4:
                continue
            given = x.to(dtype).contiguous(memory_format=memory)
            mine, theirs = (outcome(layer, f, given) for f in (layer, lambda v: by_autograd(layer, v)))
            for a, b in zip(mine, theirs, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
            assert (mine[1] == 0).any(), "nothing was clipped"


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_in_float64(kind):
    """Gradients are those of the straight-through estimator, written with torch's own operations in float64."""
    layer, x = layer_of(kind)
    scale, zero_point = layer.input_quantizer.scale.double(), layer.input_quantizer.zero_point.double()
    grid, weight = layer.input_quantizer.spec.grid, layer.quantized_weight().detach().double().requires_grad_()
    y, gradient, *_ = outcome(layer, layer, x)
    v = x.double().requires_grad_()
    level = (v / scale).round() + zero_point
    inside = (level >= grid.quant_min) & (level <= grid.quant_max)
    level = (level.clamp(grid.quant_min, grid.quant_max) - zero_point) * scale
    through = torch.where(inside, v, v.detach())
    through = through + (level - through).detach()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        wanted = F.linear(through, weight, bias)
    else:
        wanted = torch.convolution(
            through, weight, bias, layer.stride, layer.padding, layer.dilation, False, [0] * (x.ndim - 2), layer.groups
        )
    wanted.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double())
    torch.testing.assert_close(y.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), v.grad, rtol=1e-5, atol=1e-5)
    # 8 bits with levels on both sides of zero clip nothing of a weight.
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def kept_bytes(model, x, dtype):
    """Returns the bytes of every storage that autograd keeps."""
    sizes, alive = {}, []

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor.detach())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with use_native(True), hooks, torch.autocast("cpu", dtype, enabled=dtype != SINGLE):
        model(x)
    return sum(sizes.values())


@pytest.mark.parametrize("plan", ["w8a8", "w4a4"])
@pytest.mark.parametrize("dtype", [BRAIN, SINGLE], ids=str)
def test_a_network_keeps_a_bit_an_element_more_than_in_float(dtype, plan):
    """By autograd alone it would be half as much again."""
    torch.manual_seed(0)
    x, model = torch.randn(16, 3, 32, 32), CifarResNet(20)
    quantized = training(copy.deepcopy(model), plan, x)
    assert kept_bytes(quantized, x, dtype) <= 1.05 * kept_bytes(model, x, dtype)


def test_a_float32_input_under_autocast_is_kept_rounded():
    layer, x = layer_of("linear")
    kept = kept_bytes(layer, x.requires_grad_(), BRAIN)
    assert kept < 2 * x.numel() + 2 * layer.weight.numel() + x.numel() // 8 + 64


def test_ranges_that_move_before_the_backward_pass_change_nothing():
    layer, x = layer_of("linear")
    first = outcome(layer, layer, x)
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with use_native(True):
        y = layer(x)
        commit_observers([layer.input_quantizer])
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(x.grad, first[1])
    assert torch.equal(layer.weight.grad, first[2])


@pytest.mark.parametrize("frozen", ["weight", "input", "weight and bias"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped"])
def test_what_is_frozen_gets_no_gradient(kind, frozen):
    layer, x = layer_of(kind)
    layer.weight.requires_grad_("weight" not in frozen)
    if layer.bias is not None:
        layer.bias.requires_grad_("bias" not in frozen)
    x.requires_grad_(frozen != "input")
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    with use_native(True):
        mine, theirs = (
            torch.autograd.grad(f(x).square().sum(), wanted) for f in (layer, lambda v: by_autograd(layer, v))
        )
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_second_derivatives(kind):
    """A penalty of the gradient has the derivatives that autograd's own product gives."""
    layer, x = layer_of(kind)
    found = []
    for forward in (layer, lambda v: by_autograd(layer, v)):
        layer.zero_grad()
        v = x.detach().requires_grad_()
        with use_native(True):
            (slope,) = torch.autograd.grad(forward(v).square().sum(), v, create_graph=True)
            slope.square().sum().backward()
        found.append([slope.detach(), v.grad, *(p.grad for p in layer.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    layer, x = layer_of("conv2d")
    plain = outcome(layer, layer, x)
    again = outcome(layer, lambda v: checkpoint(layer, v, use_reentrant=reentrant), x)
    assert all(map(torch.equal, plain, again))


def test_hooks_on_quantizers_see_their_calls():
    layer, x = layer_of("linear")
    plain, calls = outcome(layer, layer, x), []
    layer.input_quantizer.register_forward_hook(lambda module, args, y: calls.append(module.name))
    layer.weight_quantizer.register_forward_hook(lambda module, args, y: calls.append(module.name))
    assert all(map(torch.equal, outcome(layer, layer, x), plain))
    assert sorted(calls) == ["0.input", "0.weight"]


def test_an_input_that_is_written_to_is_refused_as_in_float_training():
    layer, x = layer_of("linear")
    messages = []
    for module in (layer, nn.Linear(12, 5)):
        v = x.detach().requires_grad_() * 1
        with use_native(True):
            y = module(v)
            v.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
                y.sum().backward()
        messages.append(str(error.value).split(";")[0])
    assert len(messages) == 2


def test_scales_on_another_device_are_torchs_error() -> None:
    layer, x = layer_of("linear")
    scale = layer.input_quantizer._buffers["scale"]
    layer.input_quantizer._buffers["scale"] = scale.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="device|meta"):
        layer(x)


def test_a_convolution_replaced_on_the_instance_is_the_one_that_runs() -> None:
    layer, x = layer_of("conv2d")

    def circular(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    layer._conv_forward = types.MethodType(circular, layer)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x), expected)


def test_hooks_on_an_input_quantizer_are_called() -> None:
    layer, x = layer_of("linear")
    called = []
    layer.input_quantizer.register_full_backward_hook(lambda *_: called.append(1))
    layer(x.requires_grad_()).sum().backward()
    assert called == [1]
