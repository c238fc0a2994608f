"""TTQ: ternary weights with two learned scales.

Forward:   w̃ = +Wp where w > Δ,   -Wn where w < -Δ,   else 0;      Δ = t · max|w|

Backward (g = ∂L/∂w̃):

    ∂L/∂Wp = Σ g over w > Δ          ∂L/∂Wn = -Σ g over w < -Δ
    ∂L/∂w  = Wp · g,   g,   Wn · g   where w > Δ, between, w < -Δ

(The paper prints ∂L/∂Wn without the minus sign; it follows from the forward formula, and the authors' code has it.)

Reference: Zhu, Han, Mao, Dally, "Trained Ternary Quantization", ICLR 2017 (arXiv 1612.01064), eqs. 6-9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.grouping import reduced_dims
from lq_plugin.functional.pieces import AT_A_TIME, elementwise
from lq_plugin.functional.transforms import applied
from lq_plugin.functional.twn import sides
from lq_plugin.native.layouts import layout_of
from lq_plugin.native.ops import takes_gradient
from lq_plugin.native.trained import Ternary, TrainedKernels, trained_kernels

#: t: Δ over the largest magnitude.
THRESHOLD = 0.05


def ternarize_learned(
    x: Tensor,
    threshold: Tensor,
    positive: Tensor,
    negative: Tensor,
    gradient_factor: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns -Wn, 0 or +Wp, with gradients for `x` and both scales.

    Args:
        x: float tensor.
        threshold: Δ, broadcastable to it; a constant.
        positive, negative: Wp and Wn, of one shape that broadcasts to `x`.
        gradient_factor: multiplies the gradients of the scales; a sum over thousands of weights is large.
        dtype: of the result, if not that of `x`.

    >>> x = torch.tensor([0.9, -0.8, 0.01], requires_grad=True)
    >>> ternarize_learned(x, torch.tensor([0.1]), torch.tensor([0.5]), torch.tensor([2.0])).detach()
    tensor([ 0.5000, -2.0000,  0.0000])
    """
    y: Tensor
    kernels = trained_kernels(x, dtype)
    if kernels is not None and x.is_contiguous() and threshold.shape == positive.shape == negative.shape:
        layout = layout_of(x, positive.shape)
        if layout is not None and layout.repeats == layout.inner == 1:
            y = _NativeTernary.apply(x, threshold, positive, negative, gradient_factor, kernels, dtype)
            return y
    y = applied(_LearnedTernary, x, threshold, positive, negative, gradient_factor, learned=(1, 2))
    return y.to(dtype or x.dtype)


class _LearnedTernary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Any, positive: Any, negative: Any, factor: Any) -> Any:
        ctx.save_for_backward(x, threshold, positive, negative)
        ctx.factor = factor
        return _forward(x, threshold, positive, negative)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, threshold, positive, negative = ctx.saved_tensors
        g = grad.float()
        above, below = sides(x.float(), threshold)
        dims = reduced_dims(tuple(positive.shape))
        # No dims at all would be every dim.
        to_positive, to_negative = [
            part.sum(dims, keepdim=True, dtype=torch.float64).float() if dims else part
            for part in (g * above, g * below)
        ]
        to_x = ((1 - above - below + above * positive + below * negative) * g).to(grad.dtype)
        return to_x, None, ctx.factor * to_positive, -ctx.factor * to_negative, None


class _NativeTernary(torch.autograd.Function):
    """TTQ by the kernels: one pass forward, one backward for all three gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        positive: Tensor,
        negative: Tensor,
        factor: Any,
        kernels: TrainedKernels,
        dtype: Any,
    ) -> Any:
        ctx.save_for_backward(x, threshold, positive, negative)
        ctx.factor, ctx.kernels = factor, kernels
        return kernels.ternary(x.detach(), _rows(threshold, positive, negative), x.dtype if dtype is None else dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *scales = ctx.saved_tensors
        if not takes_gradient(grad, x):
            return *_LearnedTernary.backward(ctx, grad.to(x.dtype)), None, None
        grad = grad.contiguous()
        to_x, above, below = ctx.kernels.ternary_backward(x, grad, _rows(*scales), ctx.needs_input_grad[0])
        to_positive, to_negative = (t.float().view(scales[1].shape) for t in (above, below))
        return to_x, None, ctx.factor * to_positive, -ctx.factor * to_negative, None, None, None


def _rows(threshold: Tensor, positive: Tensor, negative: Tensor) -> Ternary:
    threshold, positive, negative = (t.detach().float().contiguous() for t in (threshold, positive, negative))
    return threshold, positive, negative


def _forward(x: Tensor, threshold: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    if x.numel() > AT_A_TIME:
        return elementwise(_forward, x, threshold, positive, negative)
    above, below = sides(x.float(), threshold)
    return above.mul_(positive).sub_(below.mul_(negative)).to(x.dtype)
