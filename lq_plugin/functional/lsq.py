"""LSQ: a learned step size.

Forward:   v̂ = (clip(round(v / s) + z, Q_n, Q_p) - z) · s

Backward:  ∂v̂/∂v = 1 inside, 0 outside
           ∂v̂/∂s = round(v / s) - v / s   inside,   Q_n - z or Q_p - z   outside
           ∂v̂/∂z = 0                       inside,   -s                   outside

and the gradients of s and z are multiplied by g = 1 / sqrt(N · Q_p), N the number of elements that
share the scale (for activations: features of one sample, not of the batch).

Reference: Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153), eqs. 1-3;
the learned zero point follows LSQ+, Bhalgat et al. 2020 (arXiv 2004.09576).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.spec import IntegerGrid


def gradient_scale(elements: int, grid: IntegerGrid) -> float:
    """g = 1 / sqrt(N · Q_p): makes a step-size update as large, relatively, as a weight update.

    >>> gradient_scale(100, IntegerGrid(-2, 1))
    0.1
    """
    return (max(elements, 1) * max(grid.quant_max, 1)) ** -0.5


def fake_quantize_learned(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, gradient_factor: float = 1.0) -> Tensor:
    """Quantize and dequantize with gradients for `x`, `scale` and `zero_point`.

    Args:
        x: float tensor of any shape.
        scale: float32, broadcastable to `x`; its magnitude is used, so that an update through zero stays valid.
        zero_point: float32, broadcastable to `x`; used rounded, its gradient passes straight through.
        grid: the integer levels.
        gradient_factor: g above.
    """
    return _LearnedFakeQuantize.apply(x, scale, zero_point, grid.quant_min, grid.quant_max, gradient_factor)


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, factor):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.constants = quant_min, quant_max, factor
        step = scale.abs().clamp(min=MIN_SCALE)
        shift = zero_point.round().clamp(quant_min, quant_max)
        y = (x.float() * step.reciprocal()).round_()
        return torch.clamp_(y, quant_min - shift, quant_max - shift).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, factor = ctx.constants
        step = scale.abs().clamp(min=MIN_SCALE)
        shift = zero_point.round().clamp(quant_min, quant_max)
        ratio = x.float() * step.reciprocal()
        rounded = ratio.round()
        level = torch.clamp(rounded, quant_min - shift, quant_max - shift)
        outside = level != rounded
        grad32 = grad.float()
        grad_x = grad.masked_fill(outside, 0.0) if ctx.needs_input_grad[0] else None
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            # Inside: round(v/s) - v/s. Outside only the clipped level is left.
            per_element = grad32 * torch.where(outside, level, level - ratio)
            grad_scale = per_element.sum_to_size(scale.shape) * (factor * torch.where(scale < 0, -1.0, 1.0))
        if ctx.needs_input_grad[2]:
            per_element = (grad32 * -step).masked_fill(~outside, 0.0)
            grad_zero_point = per_element.sum_to_size(zero_point.shape) * factor
        return grad_x, grad_scale, grad_zero_point, None, None, None
