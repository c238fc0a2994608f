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

from lq_plugin.functional.affine import MIN_SCALE, fake_quantize
from lq_plugin.functional.transforms import applied
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import ops
from lq_plugin.native.layouts import Layout, layout_of
from lq_plugin.native.trained import TrainedKernels, trained_kernels


def fake_quantize_pact(x: Tensor, alpha: Tensor, levels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Clips to `[0, α]` and quantizes to `levels` values.

    Args:
        x: float tensor of any shape.
        alpha: float32, broadcastable to `x`.
        levels: 2^k.
        dtype: of the result, if not that of `x`; the arithmetic is float32, and rounded once.

    >>> fake_quantize_pact(torch.tensor([-1.0, 0.4, 9.0]), torch.tensor([3.0]), 4)
    tensor([0., 0., 3.])
    """
    kernels = trained_kernels(x, dtype, (alpha,))
    layout = None if kernels is None else layout_of(x, alpha.shape)
    y: Tensor
    if kernels is not None and layout is not None and layout.inner == 1:
        y = _NativePact.apply(x, alpha, levels, layout, kernels, dtype)
        return y
    y = applied(_Pact, x, alpha, levels, learned=(0,))
    return y.to(dtype or x.dtype)


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
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_alpha = grad.masked_fill(~above, 0.0).double().sum_to_size(alpha.shape).float()
        return grad_x, grad_alpha, None


class _NativePact(torch.autograd.Function):
    """PACT by the kernels: one pass forward, one backward for both gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, levels: Any, layout: Layout, kernels: TrainedKernels, dtype: Any
    ) -> Any:
        ctx.save_for_backward(x, alpha)
        ctx.of = layout, kernels
        scale = alpha.detach().clamp(min=MIN_SCALE) / (levels - 1)
        return fake_quantize(x.detach(), scale, torch.zeros_like(scale), IntegerGrid(0, levels - 1), dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, alpha = ctx.saved_tensors
        layout, kernels = ctx.of
        if not ops.takes_gradient(grad, x):
            return *_Pact.backward(ctx, grad.to(x.dtype)), None, None, None
        needs_x, needs_alpha, *_ = ctx.needs_input_grad
        inside, slope = kernels.pact_backward(x, ops.laid_out(grad, x.stride()), alpha.detach(), layout, needs_x)
        return inside, slope.float().view(alpha.shape) if needs_alpha else None, *(None,) * 4
