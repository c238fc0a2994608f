"""Dynamic ranges: scale and zero point of an activation from the tensor at hand, at run time.

With lo = min(min x, 0) and hi = max(max x, 0) of the values that share a scale:

    affine:     s = (hi - lo) / (quant_max - quant_min),   z = round(clip(quant_min - lo / s, quant_min, quant_max))
    symmetric:  s = max(hi / quant_max, lo / quant_min),   z = 0

    x̂ = (clip(round(x / s) + z, quant_min, quant_max) - z) · s

Where all values are 0, s = 1. `round` is half to even, and x / s is a division: `uint8 affine dynamic` is ONNX's
DynamicQuantizeLinear, bit for bit. Nothing is calibrated or kept, and training computes what evaluation does. With one
scale for the tensor, what a sample gets depends on the batch it is in.

Reference: ONNX, operator DynamicQuantizeLinear, opset 11; a scale for each token: Yao et al., "ZeroQuant"
(arXiv 2206.01861), section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.transforms import applied
from lq_plugin.intent.spec import IntegerGrid


def dynamic_qparams(minimum: Tensor, maximum: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point for the smallest and largest of the values that share them.

    Args:
        minimum, maximum: float tensors of one shape.
        grid: the integer levels.

    Returns:
        `(scale, zero_point)`, float32 of the same shape; zero points are integers.

    >>> dynamic_qparams(torch.tensor(-1.0), torch.tensor(254.0), IntegerGrid(0, 255, affine=True))
    (tensor(1.), tensor(1.))
    >>> dynamic_qparams(torch.tensor(0.0), torch.tensor(0.0), IntegerGrid(-128, 127))
    (tensor(1.), tensor(0.))
    """
    low, high = minimum.float().clamp(max=0.0), maximum.float().clamp(min=0.0)
    if grid.affine:
        scale = (high - low) / (grid.quant_max - grid.quant_min)
    else:
        scale = high / grid.quant_max if grid.quant_max > 0 else torch.zeros_like(high)
        if grid.quant_min < 0:
            scale = torch.maximum(scale, low / grid.quant_min)
    # Values so small that the quotient is 0 are zeros as well.
    scale = torch.where(scale == 0, 1.0, scale)
    if not grid.affine:
        return scale, torch.zeros_like(scale)
    return scale, (grid.quant_min - low / scale).clamp(grid.quant_min, grid.quant_max).round()


def fake_quantize_dynamic(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Quantizes and dequantizes by division, with the straight-through gradient.

    Forward:  x̂ = (clip(round(x / s) + z, quant_min, quant_max) - z) · s

    Backward: ∂x̂/∂x = 1 where quant_min ≤ round(x / s) + z ≤ quant_max, else 0; scale and zero point are constants.

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, broadcastable to `x`.
        grid: the integer levels.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> x = torch.tensor([-2.0, 0.26, 0.9], requires_grad=True)
    >>> y = fake_quantize_dynamic(x, torch.tensor(0.5), torch.tensor(0.0), IntegerGrid(-2, 1))
    >>> y.sum().backward()
    >>> y.detach(), x.grad
    (tensor([-1.0000,  0.5000,  0.5000]), tensor([0., 1., 0.]))
    """
    y: Tensor = applied(_FakeQuantizeDynamic, x, scale, zero_point, grid)
    return y


class _FakeQuantizeDynamic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Any) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = grid
        levels = (x.float() / scale).round_()
        # clip(r + z) - z is clip(r, quant_min - z, quant_max - z): all are integers, exact in float32.
        return torch.clamp_(levels, grid.quant_min - zero_point, grid.quant_max - zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        levels = (x.float() / scale).round_()
        clipped = (levels < ctx.grid.quant_min - zero_point) | (levels > ctx.grid.quant_max - zero_point)
        return grad.masked_fill(clipped, 0.0), None, None, None
