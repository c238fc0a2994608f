"""The training forward pass of single layers with integers, and the reasons of layers that keep fake quantization."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.intent.spec import IntegerGrid, PerChannel, PerTensor
from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.integer.arithmetic import Arithmetic, arithmetic_on
from lq_plugin.layers.integer.function import IntegerProduct, Levels
from lq_plugin.layers.integer.state import WORTH, WORTH_ON_GPU, IntegerForward
from lq_plugin.layers.product import Convolution
from lq_plugin.native.ops import kernels_for
from lq_plugin.quantizers import ActivationQuantizer, Quantizer, SharedInput, StagedQuantizer, WeightQuantizer

#: Sums of more products of 8 bits could leave 32 bits.
MAX_PRODUCTS = 2**31 // (255 * 128) - 1
#: Timed rounds of a trial, after one that is not.
ROUNDS = 3


def why_never(layer: QuantizedLayer) -> str | None:
    """Returns why a layer cannot compute with integers whatever its input; None: it can."""
    arithmetic = arithmetic_on(layer.weight.device)
    if isinstance(arithmetic, str):
        return arithmetic
    # Of the class itself: one that inherits it may do more in its forward.
    if not vars(type(layer)).get("has_integer_kernel", False) and not _projects(layer):
        owner = getattr(layer, "owner", None)
        kind = (
            type(layer).float_class.__name__
            if owner is None
            else f"{cast(Any, layer).key} of {type(owner).float_class.__name__}"
        )
        return f"{kind} has no integer kernel"
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    if weight is None or inputs is None:
        return f"its {'weight' if weight is None else 'input'} is float"
    for quantizer, wanted, slot in ((weight, WeightQuantizer, "weight"), (inputs, ActivationQuantizer, "input")):
        if (reason := _why_not_quantizer(quantizer, wanted, slot)) is not None:
            return reason
    if weight.spec.grid.affine:
        return "its weight has a zero point"
    granularity = weight.spec.granularity
    if not (
        isinstance(granularity, PerTensor) or (isinstance(granularity, PerChannel) and granularity.axis in (None, 0))
    ):
        return f"its weight's scales are {granularity}"
    if not isinstance(inputs.spec.granularity, PerTensor):
        return f"its input's scales are {inputs.spec.granularity}"
    products = layer.weight[0].numel()
    if products > MAX_PRODUCTS:
        return f"sums of {products} products may leave 32 bits"
    reason = _why_not_convolution(layer) if isinstance(layer, nn.Conv2d) else None
    return reason or _why_not_here(layer, arithmetic)


def _projects(layer: QuantizedLayer) -> bool:
    """Returns whether a layer is the joint projection of query, key and value in torch's attention."""
    owner = getattr(layer, "owner", None)
    return getattr(owner, "float_class", None) is nn.MultiheadAttention and cast(Any, layer).key == "in_proj_weight"


def _bias(layer: QuantizedLayer) -> Tensor | None:
    """Returns the bias that is added to the layer's products."""
    found: Tensor | None = cast(Any, layer).owner.in_proj_bias if _projects(layer) else cast(Any, layer).bias
    return found


def _why_not_quantizer(quantizer: Quantizer | StagedQuantizer, wanted: type[Quantizer], slot: str) -> str | None:
    if isinstance(quantizer, StagedQuantizer):
        return f"its {slot} is quantized in stages"
    if type(quantizer) is not wanted:  # learned ranges and other formats are subclasses
        return f"its {slot} is quantized by {quantizer.spec}"
    if quantizer.spec.stochastic or quantizer.spec.gradient != "clipped":
        return f"its {slot}'s rounding is {quantizer.spec}"
    grid = quantizer.spec.grid if quantizer.spec.has_grid else IntegerGrid(0, 2**16)
    fits = grid.levels <= 256 if slot == "input" else grid.quant_min >= -128 and grid.quant_max <= 127
    return None if fits else f"its {slot} ({quantizer.spec}) does not fit in 8 bits"


def _why_not_here(layer: QuantizedLayer, arithmetic: Arithmetic) -> str | None:
    """Returns the device's objection; asked at each call also, since the layer may have moved."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if groups > 1 and not arithmetic.grouped:
        return f"it is a convolution of {groups} groups"
    weight, inputs = cast(WeightQuantizer, layer.weight_quantizer), cast(ActivationQuantizer, layer.input_quantizer)
    return arithmetic.why_inexact(weight.spec.grid, inputs.spec.grid)


def _why_not_convolution(layer: nn.Conv2d) -> str | None:
    if layer.padding_mode != "zeros":
        return f"its padding mode is {layer.padding_mode!r}"
    if isinstance(layer.padding, str):
        return f"its padding is {layer.padding!r}"
    if layer.groups > 1 and layer.in_channels == layer.groups:
        return "it is a depthwise convolution"
    return None


def integer_forward(layer: QuantizedLayer, x: Tensor) -> Tensor | None:
    """The layer's output before its output quantizer, by integer sums; None: fake quantization is to compute it."""
    state = cast(IntegerForward, layer._integer_state)
    if not cast(nn.Module, layer).training or state.reason is not None or state.chosen is False or not x.numel():
        return None
    if torch.compiler.is_compiling():
        state.refusals["torch.compile traces it"] = None
        return None
    arithmetic = arithmetic_on(x.device)
    refusal = arithmetic if isinstance(arithmetic, str) else _refusal(layer, x, arithmetic)
    if refusal is not None:
        state.refusals[refusal] = None
        return None
    assert not isinstance(arithmetic, str)
    weight, bias = layer.weight, _bias(layer)
    if state.chosen is None:
        state.worth = WORTH_ON_GPU if x.is_cuda else WORTH
        # The trial's step itself is computed by fake quantization on every rank, whatever is measured.
        state.ratio = _trial(layer, x, arithmetic) if state.ratio is None else state.ratio
        return None
    for quantizer, value in ((layer.weight_quantizer, weight), (layer.input_quantizer, x)):
        module = cast(nn.Module, quantizer)
        if module._forward_hooks or module._forward_pre_hooks:
            # Who watches the quantizers sees what it would; looking changes no number.
            with torch.no_grad():
                module(value)
    shared = layer._shared_input if layer._shared_input is not None and layer._shared_input.takes(x) else None
    y = _integer(layer, x, weight, bias, arithmetic, shared)
    if y is None:
        state.refusals["the input or the weight has a NaN"] = None
    return y


def _refusal(layer: QuantizedLayer, x: Tensor, arithmetic: Arithmetic) -> str | None:
    """Returns why this call cannot be computed with integers; None: it can."""
    weight, bias = layer.weight, _bias(layer)
    if (isinstance(layer, nn.Conv2d) and x.ndim != 4) or x.ndim < 2:
        return "its input has no batch dim"
    reason = _why_not_here(layer, arithmetic) or arithmetic.refusal(x, weight, bias, convolution_of(layer))
    if reason is not None:
        return reason
    if kernels_for(x) is None or kernels_for(weight) is None:
        return "its tensors are not plain dense ones, or compiled kernels are switched off"
    quantizers = cast(Any, (layer.weight_quantizer, layer.input_quantizer))
    if not all(q.is_enabled and q.collector is None and not q.lacks_range for q in quantizers):
        return "it is not quantized yet"
    return None


def _integer(
    layer: QuantizedLayer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arithmetic: Arithmetic,
    shared: SharedInput | None = None,
) -> Tensor | None:
    inputs, weights = cast(ActivationQuantizer, layer.input_quantizer), cast(WeightQuantizer, layer.weight_quantizer)
    levels = _levels(inputs, x, arithmetic, shared)
    grid = weights.spec.grid
    live = weights.live and not weights.is_fixed
    scale = weights.scale.detach().reshape(-1)
    clips = not (live and grid.quant_min < 0 < grid.quant_max)
    operands = None if levels is None else arithmetic.operands(levels, weight, (scale, grid, live, clips))
    return (
        None if operands is None else IntegerProduct.apply(x, weight, bias, operands, convolution_of(layer), arithmetic)
    )


def _levels(
    inputs: ActivationQuantizer, x: Tensor, arithmetic: Arithmetic, shared: SharedInput | None
) -> Levels | None:
    masked, watches = x.requires_grad and torch.is_grad_enabled(), inputs.moving and inputs.observing
    qparams = inputs.scale.detach(), inputs.zero_point.detach(), inputs.spec.grid
    if shared is None:
        return arithmetic.levels(x, qparams, masked, (inputs.batch_min, inputs.batch_max) if watches else None)

    def make() -> tuple[Levels | None, tuple[Tensor, Tensor]]:
        extremes = torch.full_like(inputs.scale, torch.inf), torch.full_like(inputs.scale, -torch.inf)
        return arithmetic.levels(x, qparams, masked, extremes if watches else None), extremes

    found, extremes = shared.once(
        x, ("levels", inputs.spec.grid, inputs.scale.item(), inputs.zero_point.item(), watches), make
    )
    if watches:
        inputs.take_in(*extremes)
    return found


def convolution_of(layer: Any) -> Convolution | None:
    """Returns the settings of a convolution; None for a linear layer."""
    if not isinstance(layer, nn.Conv2d):
        return None
    return Convolution(list(layer.stride), list(cast(Any, layer.padding)), list(layer.dilation), layer.groups)


def _fake_quantized(layer: QuantizedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert layer.weight_quantizer is not None
    assert layer.input_quantizer is not None
    # Without what layers share: a trial is to compute it each time.
    x, weight = layer.input_quantizer(x), layer.weight_quantizer(weight)
    convolution = convolution_of(layer)
    return F.linear(x, weight, bias) if convolution is None else F.conv2d(x, weight, bias, *convolution)


def _trial(layer: QuantizedLayer, x: Tensor, arithmetic: Arithmetic) -> float:
    """Returns the time of a forward and backward pass with integers over that of fake quantization, on this input.

    Nothing is left of it: the observed extremes are those of the same input, and no random number is drawn.
    """
    copies = [
        None if t is None else t.detach().requires_grad_(t.requires_grad) for t in (x, layer.weight, _bias(layer))
    ]
    wanted = [tensor for tensor in copies if tensor is not None and tensor.requires_grad]
    x, weight, bias = cast(Tensor, copies[0]), cast(Tensor, copies[1]), copies[2]
    gradient: Tensor | None = None
    best = [float("inf"), float("inf")]
    # What a trial saves is not to be seen by a checkpoint around it, whose second run has no trial.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        for index in range(1 + ROUNDS):
            for which in (0, 1):
                before = _clock(x)
                y = _integer(layer, x, weight, bias, arithmetic) if which else _fake_quantized(layer, x, weight, bias)
                if y is None:
                    return 1.0
                if wanted:
                    gradient = torch.ones_like(y) if gradient is None else gradient
                    torch.autograd.grad(y, wanted, gradient)
                if index:
                    best[which] = min(best[which], _clock(x) - before)
    return best[1] / best[0]


def _itself(x: Tensor) -> Tensor:
    return x


def _clock(x: Tensor) -> float:
    """Seconds; on a GPU once all that was started is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
