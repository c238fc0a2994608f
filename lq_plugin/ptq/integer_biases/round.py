"""Biases rounded to what integer runtimes add: int32 in steps of input scale times weight scale.

A runtime that computes a layer with integers sums products of codes, each worth s_x · s_w, and adds the bias in the
same unit. Its file therefore holds round(b / (s_x s_w)) as int32. The rounding is at most half a step and far below
one step of the layer's output, but now and then it turns an output to the next level, and these differences grow from
layer to layer: in a ResNet-20 with 8 bits, 0.02 % of the inputs of the second layer and 33 % of those of the last.
Here the model's own biases are rounded, so that model and file compute the same; the task's metric does not move.

A batch norm after a layer moves into it when a file is written: with g = γ / √(σ² + ε) the bias is β - μ g + b g and
the step s_x s_w |g|. Then β takes the difference.

Lifecycle: once, after everything else that changes scales, weights or biases. Layers with float or block-wise scales of
activations, with groups of weight scales, or whose bias does not fit into 32 bits are left as they are: runtimes add
their biases in float.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018 (arXiv 1712.05877), section 2.4, equation 11: S_bias = S_1 S_2, Z_bias = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.layers import QuantizedLayer, weight_of
from lq_plugin.layers.registry import known_operation
from lq_plugin.model.graph.record import Recording
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs

_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class RoundedBiases:
    """The result of `round_biases`.

    Args:
        changed: what was rounded, by the layer's name: its bias, or that of the batch norm after it.
        skipped: quantized layers that keep their bias, and why.
    """

    changed: dict[str, str]
    skipped: dict[str, str]


def round_biases(model: nn.Module, recording: Recording) -> RoundedBiases:
    """Rounds the biases of layers with integer weights and inputs to steps of input scale times weight scale, in place.

    Args:
        model: prepared and calibrated.
        recording: of one pass of it, which shows the batch norm that alone reads a layer.

    >>> import lq_plugin
    >>> from lq_plugin.model.graph.record import record
    >>> net, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(16, 4)
    >>> _ = lq_plugin.prepare(net, "w8a8")
    >>> _ = lq_plugin.calibrate(net, [x])
    >>> round_biases(net, record(net, lambda: net(x))).changed
    {'0': '0.bias'}
    """
    modules = dict(model.named_modules())
    norms = {pair.producer: pair.batch_norm for pair in find_batch_norm_pairs(model, recording)[0]}
    changed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    with torch.no_grad():
        for name, layer in quantized_layers(model):
            step = _step(layer)
            if isinstance(step, str):
                skipped[name] = step
                continue
            norm = modules[norms[name]] if name in norms else None
            # A bias that was computed, by a parametrization, is no parameter to round.
            bias = layer._parameters.get("bias") if norm is None else norm._parameters.get("bias")
            if bias is None:
                skipped[name] = "it has no bias"
                continue
            fault = _round(bias, step, layer, norm)
            if fault is None:
                changed[name] = f"{name if norm is None else norms[name]}.bias"
            else:
                skipped[name] = fault
    return RoundedBiases(changed, skipped)


def _step(layer: QuantizedLayer) -> Tensor | str:
    """Returns the step of a layer's integer sums, float64 `[C_out]` or `[1]`, or why it has none."""
    if not known_operation(layer):
        return "it is no plain matrix product or convolution"
    weight, read = layer.weight_quantizer, layer.input_quantizer
    weight, read = (None if each is None else each.current for each in (weight, read))
    if weight is None or read is None:
        return "its weight or its input is float"
    for what, spec in (("weight", weight.spec), ("input", read.spec)):
        if (fault := _spec_fault(what, spec)) is not None:
            return fault
    if read.scale.numel() != 1:
        return "its input has several scales"
    # Ranges of weights may be those of each step: what the quantizer holds is an earlier one then.
    scale = weight.qparams(type(layer).canonical(layer, weight_of(layer).detach()))[0]
    step: Tensor = scale.detach().double().flatten() * read.scale.detach().double().flatten()
    return step


def _spec_fault(what: str, spec: QuantSpec) -> str | None:
    if not spec.is_uniform or isinstance(spec.granularity, PerGroup):
        return f"its {what} ({spec}) has no scale that a sum of integers shares"
    return f"its {what} ({spec}) has ranges of its own at run time" if spec.dynamic else None


def _round(bias: nn.Parameter, step: Tensor, layer: QuantizedLayer, norm: nn.Module | None) -> str | None:
    """Rounds a bias to steps, in place; returns why it cannot be."""
    total = bias.detach().double()
    if isinstance(norm, _BatchNorm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        own = layer._parameters.get("bias")
        shift = norm.running_mean.double() - (0.0 if own is None else own.detach().double())
        total, step = total - shift * gain, step * gain.abs()
    count = (total / step).round()
    # A channel of zeros has a tiny scale, and a batch norm may switch one off: its file has another step.
    settled = (step > 0) & (count.abs() <= _LIMIT)
    if not bool(settled.any()):
        return "no channel's bias fits into 32 bits"
    bias.add_(torch.where(settled, count * step - total, 0.0).to(bias.dtype))
    return None
