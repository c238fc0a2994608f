"""Uniform quantization: x̂ = (clip(round(x / scale) + zero_point) - zero_point) · scale.

Shapes: `scale` and `zero_point` broadcast against `x` (`[]`, `[C, 1, 1, 1]`, `[C, G, 1]`, ...).
`round` is half to even; the quotient is `x · (1 / scale)`, as in torch's own fake-quant kernels,
so that results agree with them bit for bit.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018 (arXiv 1712.05877); Krishnamoorthi (arXiv 1806.08342).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.spec import IntegerGrid

#: Scales below this are replaced by it: a constant-zero channel stays representable, and
#: 1 / scale stays finite in float32.
MIN_SCALE = 2.0**-100


def qparams_from_bounds(minimum: Tensor, maximum: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose levels cover `[minimum, maximum]`, always with an exact zero.

    Affine: scale = (max - min) / (levels - 1), zero_point = quant_min - round(min / scale), with
    min ≤ 0 ≤ max. Otherwise the zero point is 0 and the scale is the smallest one that
    reaches both bounds: max(max / quant_max, min / quant_min); an unsigned grid clips below zero.

    Args:
        minimum, maximum: float tensors of one shape.
        grid: the integer levels.

    Returns:
        `(scale, zero_point)`, float32 of the same shape; zero points are whole numbers.

    >>> qparams_from_bounds(torch.tensor(-1.0), torch.tensor(0.5), IntegerGrid(-128, 127))
    (tensor(0.0078), tensor(0.))
    >>> qparams_from_bounds(torch.tensor(-1.0), torch.tensor(3.0), IntegerGrid(0, 3, affine=True))
    (tensor(1.3333), tensor(1.))
    """
    minimum = minimum.float().clamp(max=0.0)
    maximum = maximum.float().clamp(min=0.0)
    if grid.affine:
        # Divided before the difference is taken: max - min may overflow float32.
        steps = grid.levels - 1
        scale = (maximum / steps - minimum / steps).clamp(min=MIN_SCALE)
        zero_point = (grid.quant_min - torch.round(minimum / scale)).clamp(grid.quant_min, grid.quant_max)
        return scale, zero_point
    scale = torch.zeros_like(maximum)
    if grid.quant_max > 0:
        scale = maximum / grid.quant_max
    if grid.quant_min < 0:
        scale = torch.maximum(scale, minimum / grid.quant_min)
    return scale.clamp(min=MIN_SCALE), torch.zeros_like(scale)


def bounds_from_qparams(scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Smallest and largest real value the levels stand for."""
    return (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Integer levels of `x`, int32, in `quant_min..quant_max`. No gradient."""
    q = (x.detach().float() * scale.reciprocal()).round_().add_(zero_point)
    return q.clamp_(grid.quant_min, grid.quant_max).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of integer levels: (q - zero_point) · scale, float32."""
    return (q - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Quantize and dequantize, with the straight-through gradient.

    Forward:  x̂ = (clip(round(x / s) + z, quant_min, quant_max) - z) · s

    Backward: ∂x̂/∂x = 1 where quant_min ≤ round(x / s) + z ≤ quant_max, else 0; scale and zero
    point are constants (learned ones: `lq_plugin.functional.lsq`).

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, broadcastable to `x`.
        grid: the integer levels.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> x = torch.tensor([-2.0, 0.26, 0.9], requires_grad=True)
    >>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), IntegerGrid(-2, 1)).detach()
    tensor([-1.0000,  0.5000,  0.5000])
    """
    return _FakeQuantize.apply(x, scale, zero_point, grid.quant_min, grid.quant_max)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.quant_min, ctx.quant_max = quant_min, quant_max
        y = (x.float() * scale.reciprocal()).round_()
        # clip(r + z) - z is clip(r, qmin - z, qmax - z): all are whole numbers, exact in float32.
        y = torch.clamp_(y, quant_min - zero_point, quant_max - zero_point).mul_(scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        # Recomputed from the input: no mask tensor is kept between forward and backward.
        r = (x.float() * scale.reciprocal()).round_()
        outside = (r < ctx.quant_min - zero_point).logical_or_(r > ctx.quant_max - zero_point)
        return grad.masked_fill(outside, 0.0), None, None, None, None
