"""Uniform quantization: x̂ = (clip(round(x / scale) + zero_point) - zero_point) · scale.

Shapes: `scale` and `zero_point` broadcast against `x` (`[]`, `[C, 1, 1, 1]`, `[C, G, 1]`, ...).
`round` is half to even; the quotient is `x · (1 / scale)`, as in torch's own fake-quant kernels,
so that results agree with them bit for bit.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018 (arXiv 1712.05877); Krishnamoorthi (arXiv 1806.08342).
"""

from __future__ import annotations

import numpy as np
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
        return scale, zero_point_from(minimum, scale, grid)
    scale = torch.zeros_like(maximum)
    if grid.quant_max > 0:
        scale = maximum / grid.quant_max
    if grid.quant_min < 0:
        scale = torch.maximum(scale, minimum / grid.quant_min)
    return scale.clamp(min=MIN_SCALE), torch.zeros_like(scale)


def zero_point_from(minimum: Tensor, scale: Tensor, grid: IntegerGrid) -> Tensor:
    """The level that stands for 0 where `minimum` (≤ 0) falls on the lowest one; 0 on a grid without zero point."""
    if not grid.affine:
        return torch.zeros_like(scale)
    return (grid.quant_min - torch.round(minimum / scale)).clamp(grid.quant_min, grid.quant_max)


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
        # clip(r + z) - z is clip(r, qmin - z, qmax - z): all are whole numbers, exact in float32.
        if _has_cheap_scalars(x, scale, zero_point):
            low, high = quant_min - zero_point.item(), quant_max - zero_point.item()
            return (x * scale.reciprocal().item()).round_().clamp_(low, high).mul_(scale.item())
        y = (x.float() * scale.reciprocal()).round_()
        return torch.clamp_(y, quant_min - zero_point, quant_max - zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        # From the saved input: no mask tensor is kept between forward and backward.
        x, scale, zero_point = ctx.saved_tensors
        if _has_cheap_scalars(x, scale, zero_point):
            low, high = _pass_band(scale.item(), ctx.quant_min - zero_point.item(), ctx.quant_max - zero_point.item())
            # One vectorised kernel for grad · 1{low < x < high}.
            return torch.ops.aten.hardtanh_backward(grad, x, low, high), None, None, None, None
        r = (x.float() * scale.reciprocal()).round_()
        outside = (r < ctx.quant_min - zero_point).logical_or_(r > ctx.quant_max - zero_point)
        return grad.masked_fill(outside, 0.0), None, None, None, None


def _has_cheap_scalars(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Whether Python numbers may stand for the qparams: kernels with scalars are several times faster on CPU.

    On other devices reading them would wait for the device, and under torch.compile it breaks the graph.
    """
    if torch.compiler.is_compiling() or x.dtype != torch.float32:
        return False
    return scale.numel() == 1 and zero_point.numel() == 1 and scale.device.type == x.device.type == "cpu"


def _pass_band(scale: float, low: float, high: float) -> tuple[float, float]:
    """The float32 numbers next to those that round to `low..high`: round(x / scale) is in it where a < x < b.

    >>> _pass_band(1.0, -2, 2)  # 2.5 rounds to the even 2, so it is inside
    (-2.500000238418579, 2.500000238418579)
    """
    inverse = np.float32(1.0) / np.float32(scale)
    return _first_beyond(inverse, low, np.float32(-np.inf)), _first_beyond(inverse, high, np.float32(np.inf))


def _first_beyond(inverse: np.float32, level: float, direction: np.float32) -> float:
    sign = np.sign(direction)
    with np.errstate(over="ignore"):
        x = np.float32((level + 0.5 * sign) / np.float64(inverse))
        while sign * (np.rint(x * inverse) - level) > 0:
            x = np.nextafter(x, -direction)
        while sign * (np.rint(x * inverse) - level) <= 0 and np.isfinite(x):
            x = np.nextafter(x, direction)
    return float(x)
