"""Stochastic rounding: up with the probability of the fraction, so that the expected value is x.

Forward:   x̂ = (clip(⌊x / s + u⌋ + z, quant_min, quant_max) - z) · s,   u uniform in [0, 1)

Backward:  ∂x̂/∂x = 1 where quant_min ≤ x / s + z ≤ quant_max, else 0

E[x̂] = x inside the range: updates smaller than half a step are not lost, they happen sometimes.

Reference: Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015 (arXiv 1502.02551), section 3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from lq_plugin.functional.transforms import applied
from lq_plugin.intent.spec import IntegerGrid


def fake_quantize_stochastic(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, noise: Tensor) -> Tensor:
    """Quantizes and dequantizes, rounding up where the fraction exceeds 1 - u.

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, broadcastable to `x`.
        grid: the integer levels.
        noise: u, float32 in [0, 1), shaped like `x`.

    >>> import torch
    >>> x = torch.full((4,), 0.3)
    >>> noise = torch.tensor([0.0, 0.6, 0.7, 0.9])
    >>> fake_quantize_stochastic(x, torch.tensor(1.0), torch.tensor(0.0), IntegerGrid(-2, 1), noise)
    tensor([0., 0., 1., 1.])
    """
    y: Tensor = applied(_StochasticFakeQuantize, x, scale, zero_point, grid.quant_min, grid.quant_max, noise)
    return y


class _StochasticFakeQuantize(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Any, quant_max: Any, noise: Any
    ) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.quant_min, ctx.quant_max = quant_min, quant_max
        q = (x.float() * scale.reciprocal()).add_(noise).floor_()
        return q.clamp_(quant_min - zero_point, quant_max - zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        r = x.float() * scale.reciprocal()
        outside = (r < ctx.quant_min - zero_point).logical_or_(r > ctx.quant_max - zero_point)
        return grad.masked_fill(outside, 0.0), None, None, None, None, None
