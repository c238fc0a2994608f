"""MAD: a magnitude-aware derivative that lets clipped values learn.

Forward:   x̂ as `lq_plugin.functional.affine.fake_quantize`

Backward:  ∂x̂/∂x = 1 inside the range [a, b],   b / x above it,   a / x below it

With the plain clipped gradient a weight outside the range never gets one; passing it on unchanged is biased
upwards. Reference: Sakr et al., "Optimal Clipping and Magnitude-aware Differentiation for Improved
Quantization-aware Training", ICML 2022 (arXiv 2206.06501).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from lq_plugin.functional.affine import bounds_from_qparams, fake_quantize
from lq_plugin.functional.transforms import applied
from lq_plugin.intent.spec import IntegerGrid


def fake_quantize_mad(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Quantizes and dequantizes with the magnitude-aware gradient.

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, broadcastable to `x`.
        grid: the integer levels.

    >>> import torch
    >>> x = torch.tensor([0.5, 4.0, -8.0], requires_grad=True)
    >>> fake_quantize_mad(x, torch.tensor(1.0), torch.tensor(0.0), IntegerGrid(-2, 1)).sum().backward()
    >>> x.grad
    tensor([1.0000, 0.2500, 0.2500])
    """
    y: Tensor = applied(_MADFakeQuantize, x, scale, zero_point, grid)
    return y


class _MADFakeQuantize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Any) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = grid
        return fake_quantize(x, scale, zero_point, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        low, high = bounds_from_qparams(scale, zero_point, ctx.grid)
        # Both bounds have the sign of what they clip or are 0, so the factor lies in 0..1; 0 / 0 is inside.
        factor = (x.float().clamp(low, high) / x.float()).nan_to_num_(nan=1.0)
        return (grad * factor).to(grad.dtype), None, None, None
