"""PACT: a learned upper bound of a non-negative activation.

Forward:   y = clip(x, 0, α),   y_q = round(y · (2^k - 1) / α) · α / (2^k - 1)

Backward:  ∂y_q/∂x = 1{0 ≤ x < α},   ∂y_q/∂α = 1{x ≥ α}   (rounding is passed straight through)

α wants an L2 penalty with the network's own weight decay: without it, it grows.

Reference: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
2018 (arXiv 1805.06085), eqs. 1-3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE


def fake_quantize_pact(x: Tensor, alpha: Tensor, levels: int) -> Tensor:
    """Clips to `[0, α]` and quantizes to `levels` values.

    Args:
        x: float tensor of any shape.
        alpha: float32, broadcastable to `x`.
        levels: 2^k.

    >>> fake_quantize_pact(torch.tensor([-1.0, 0.4, 9.0]), torch.tensor([3.0]), 4)
    tensor([0., 0., 3.])
    """
    y: Tensor = _Pact.apply(x, alpha, levels)
    return y


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Any, levels: Any) -> Any:
        ctx.save_for_backward(x, alpha)
        scale = alpha.clamp(min=MIN_SCALE) / (levels - 1)
        return (x.float() * scale.reciprocal()).round_().clamp_(0, levels - 1).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, alpha = ctx.saved_tensors
        above = x >= alpha
        grad_x = grad.masked_fill((x < 0).logical_or_(above), 0.0) if ctx.needs_input_grad[0] else None
        grad_alpha = grad.float().masked_fill(~above, 0.0).sum_to_size(alpha.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_alpha, None
