"""LSQ: a learned step size.

Forward:   v̂ = (clip(round(v / s) + z, Q_n, Q_p) - z) · s

Backward:  ∂v̂/∂v = 1 inside, 0 outside
           ∂v̂/∂s = round(v / s) - v / s   inside,   Q_n - z or Q_p - z   outside
           ∂v̂/∂z = 0                       inside,   -s                   outside

and the gradients of s and z are multiplied by g = 1 / sqrt(N · Q_p), N the number of elements that
share the scale (for activations: features of one sample, not of the batch). Their sums are taken in float64.

Reference: Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153), eqs. 1-3;
the learned zero point follows LSQ+, Bhalgat et al. 2020 (arXiv 2004.09576).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE, native_layout
from lq_plugin.native import ops
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
    bounds = grid.quant_min, grid.quant_max
    if torch.compiler.is_compiling():
        if ops.traceable(x, scale) and zero_point.numel() == 1:
            return _TracedLearned.apply(x, scale, zero_point, *bounds, gradient_factor)
    elif (kernels := ops.kernels_for(x)) is not None:
        layout = native_layout(x, scale, zero_point)
        if layout is not None and layout.inner == 1:
            return _NativeLearned.apply(x, scale, zero_point, *bounds, gradient_factor, layout, kernels)
    return _LearnedFakeQuantize.apply(x, scale, zero_point, *bounds, gradient_factor)


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
            grad_scale = _summed(per_element, scale) * (factor * torch.where(scale < 0, -1.0, 1.0))
        if ctx.needs_input_grad[2]:
            per_element = (grad32 * -step).masked_fill(~outside, 0.0)
            grad_zero_point = _summed(per_element, zero_point) * factor
        return grad_x, grad_scale, grad_zero_point, None, None, None


class _NativeLearned(torch.autograd.Function):
    """The kernels: one pass forward, one backward for all three gradients."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, factor, layout, kernels):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.constants = quant_min, quant_max, factor
        ctx.layout, ctx.kernels = layout, kernels
        return kernels.fake_quantize(x, scale, zero_point, (quant_min, quant_max), layout, masked=False, learned=True)[0]

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        needs_x, needs_scale, needs_zero_point, *_ = ctx.needs_input_grad
        watched = torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad)
        if watched or type(grad) is not Tensor or ops.kernels_for(x) is None:
            # A second derivative, or what cannot be taken by its address.
            return *_LearnedFakeQuantize.backward(ctx, grad), None, None
        quant_min, quant_max, factor = ctx.constants
        grad = ops.laid_out(grad, x.stride())
        bounds = quant_min, quant_max
        inside, slope, shift = ctx.kernels.learned_backward(x, grad, scale, zero_point, bounds, ctx.layout, needs_x, needs_zero_point)
        return (
            inside,
            _of_scale(slope, scale, factor) if needs_scale else None,
            shift.float().view(zero_point.shape) * factor if shift is not None else None,
            *(None,) * 5,
        )


class _TracedLearned(torch.autograd.Function):
    """The kernels in a graph of torch.compile."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, factor):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.constants = quant_min, quant_max, factor
        return torch.ops.lq_plugin.fake_quantize(x, scale, zero_point, quant_min, quant_max, True)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, factor = ctx.constants
        inside, slope, shift = torch.ops.lq_plugin.learned_backward(x, grad, scale, zero_point, quant_min, quant_max)
        return inside, _of_scale(slope, scale, factor), shift.float().view(zero_point.shape) * factor, None, None, None


def _of_scale(slope: Tensor, scale: Tensor, factor: float) -> Tensor:
    return slope.float().view(scale.shape) * (factor * torch.where(scale < 0, -1.0, 1.0))


def _summed(terms: Tensor, like: Tensor) -> Tensor:
    """Sums of float32 `terms` over what shares an element of `like`, taken in float64: their order changes nothing to speak of."""
    if like.numel() == 1 and terms.is_contiguous() and terms.device.type == "cpu" and not torch.compiler.is_compiling():
        # In pieces: a float64 copy of all terms would be twice their size.
        total = torch.stack([piece.double().sum() for piece in terms.reshape(-1).split(2**17)]).sum()
        return total.float().expand(like.shape) if like.ndim else total.float()
    return terms.double().sum_to_size(like.shape).float()
