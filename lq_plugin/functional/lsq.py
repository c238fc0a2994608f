"""LSQ: a learned step size.

Forward:   v̂ = (clip(round(v / s) + z, Q_n, Q_p) - z) · s

Backward:  ∂v̂/∂v = 1 inside, 0 outside
           ∂v̂/∂s = round(v / s) - v / s   inside,   Q_n - z or Q_p - z   outside
           ∂v̂/∂z = 0                       inside,   -s                   outside

and the gradients of s and z are multiplied by g = 1 / sqrt(N · Q_p), N the number of elements that
share the scale (for activations: features of one sample, not of the batch). Their sums are taken in float64.

What is inside is the `band`: `paper` is Q_n - z < v / s < Q_p - z (eqs. 3 and 5); `rounded` is what round(v / s) does
not leave the grid of, half a step more on both sides, as in torch's `_fake_quantize_learnable_per_tensor_affine`.

Reference: Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153), eqs. 1-3 and 5;
the learned zero point follows LSQ+, Bhalgat et al. 2020 (arXiv 2004.09576), section 3.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.transforms import applied
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import ops
from lq_plugin.native.layouts import layout_of

Band = Literal["paper", "rounded"]


def gradient_scale(elements: int, grid: IntegerGrid) -> float:
    """Returns g = 1 / sqrt(N · Q_p), which makes step-size updates relatively as large as weight updates.

    >>> gradient_scale(100, IntegerGrid(-2, 1))
    0.1
    """
    value: float = (max(elements, 1) * max(grid.quant_max, 1)) ** -0.5
    return value


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: IntegerGrid,
    gradient_factor: float = 1.0,
    band: Band = "paper",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantizes and dequantizes with gradients for `x`, `scale` and `zero_point`.

    Args:
        x: float tensor of any shape.
        scale: float32, broadcastable to `x`; its magnitude is used, so that an update through zero stays valid.
        zero_point: float32, broadcastable to `x`; used rounded, its gradient passes straight through.
        grid: the integer levels.
        gradient_factor: g above.
        band: which elements the gradient passes, see above.
        dtype: of the result, if not that of `x`; the arithmetic is float32, and rounded once.

    Raises:
        ValueError: for another `band`.

    >>> x = torch.tensor([0.9, 1.2, 1.6], requires_grad=True)
    >>> fake_quantize_learned(x, torch.tensor([1.0]), torch.tensor([0.0]), IntegerGrid(-2, 1)).sum().backward()
    >>> x.grad  # 1.2 rounds to the largest level, 1, and lies above it
    tensor([1., 0., 0.])
    """
    if band not in get_args(Band):
        raise ValueError(f"band must be one of {', '.join(get_args(Band))}, got {band!r}")
    constants = grid.quant_min, grid.quant_max, gradient_factor, band == "rounded"
    if torch.compiler.is_compiling():
        if ops.traceable(x, scale, dtype) and zero_point.numel() == 1:
            y: Tensor = _TracedLearned.apply(x, scale, zero_point, *constants, dtype)
            return y
    elif (kernels := ops.kernels_for(x, dtype, (scale, zero_point))) is not None:
        layout = layout_of(x, scale.shape)
        if layout is not None and layout.inner == 1:
            y = _NativeLearned.apply(x, scale, zero_point, constants, layout, kernels, dtype)
            return y
    y = applied(_LearnedFakeQuantize, x, scale, zero_point, constants, learned=(0, 1))
    return y.to(dtype or x.dtype)


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, constants: Any) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.constants = constants
        quant_min, quant_max, *_ = constants
        step = scale.abs().clamp(min=MIN_SCALE)
        shift = zero_point.round().clamp(quant_min, quant_max)
        y = (x.float() * step.reciprocal()).round_()
        return torch.clamp_(y, quant_min - shift, quant_max - shift).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        return *lsq_gradients(x, scale, zero_point, grad, ctx.constants, ctx.needs_input_grad[:3]), None


def lsq_gradients(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grad: Tensor,
    constants: tuple[int, int, float, bool],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of x, scale and zero point by torch operations, which have derivatives themselves.

    Args:
        x, scale, zero_point: of the forward pass.
        grad: of its result.
        constants: quant_min, quant_max, gradient_factor, and whether the band is the rounded one.
        needs: which of the three; the others are None.
    """
    quant_min, quant_max, factor, by_rounded = constants
    step = scale.abs().clamp(min=MIN_SCALE)
    shift = zero_point.round().clamp(quant_min, quant_max)
    ratio = x.float() * step.reciprocal()
    rounded = ratio.round()
    low, high = quant_min - shift, quant_max - shift
    level = torch.clamp(rounded, low, high)
    # A NaN is outside.
    outside = level != rounded if by_rounded else ~((ratio > low) & (ratio < high))
    grad32 = grad.float()
    grad_x = grad.masked_fill(outside, 0.0) if needs[0] else None
    grad_scale = grad_zero_point = None
    if needs[1]:
        # Inside: round(v/s) - v/s. Outside only the clipped level is left.
        per_element = grad32 * torch.where(outside, level, level - ratio)
        grad_scale = _summed(per_element, scale) * (factor * torch.where(scale < 0, -1.0, 1.0))
    if needs[2]:
        per_element = (grad32 * -step).masked_fill(~outside, 0.0)
        grad_zero_point = _summed(per_element, zero_point) * factor
    return grad_x, grad_scale, grad_zero_point


class _NativeLearned(torch.autograd.Function):
    """LSQ by the kernels: one pass forward, one backward for all three gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, constants: Any, layout: Any, kernels: Any, dtype: Any
    ) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.constants, ctx.layout, ctx.kernels = constants, layout, kernels
        return kernels.fake_quantize(
            x, scale, zero_point, constants[:2], layout, masked=False, learned=True, dtype=dtype
        )[0]  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if not ops.takes_gradient(grad, x) or ops.kernels_for(x) is None:
            found = lsq_gradients(x, scale, zero_point, grad.to(x.dtype), ctx.constants, needs)
            return *found, *(None,) * 4
        quant_min, quant_max, factor, rounded = ctx.constants
        inside, slope, shift = ctx.kernels.learned_backward(
            x, ops.laid_out(grad, x.stride()), scale, zero_point, (quant_min, quant_max), rounded, ctx.layout,
            needs_x=needs[0], needs_zero_point=needs[2],
        )  # fmt: skip
        return (
            inside,
            _of_scale(slope, scale, factor) if needs[1] else None,
            shift.float().view(zero_point.shape) * factor if needs[2] else None,
            *(None,) * 4,
        )


class _TracedLearned(torch.autograd.Function):
    """Fake quantization by the kernels in a graph of torch.compile."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: Any,
        quant_max: Any,
        factor: Any,
        rounded: Any,
        dtype: Any,
    ) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.constants = quant_min, quant_max, factor, rounded
        return torch.ops.lq_plugin.fake_quantize(x, scale, zero_point, quant_min, quant_max, True, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, factor, rounded = ctx.constants
        inside, slope, shift = torch.ops.lq_plugin.learned_backward(
            x, grad, scale, zero_point, quant_min, quant_max, rounded
        )
        return inside, _of_scale(slope, scale, factor), shift.float().view(zero_point.shape) * factor, *(None,) * 5


def _of_scale(slope: Tensor, scale: Tensor, factor: float) -> Tensor:
    return slope.float().view(scale.shape) * (factor * torch.where(scale < 0, -1.0, 1.0))


def _summed(terms: Tensor, like: Tensor) -> Tensor:
    """Returns the sums of float32 `terms` that share an element of `like`.

    They are summed in float64, so that their order makes no difference worth mentioning.
    """
    if like.numel() == 1 and terms.is_contiguous() and terms.device.type == "cpu" and not torch.compiler.is_compiling():
        # In pieces: a float64 copy of all terms would be twice their size.
        total = torch.stack([piece.double().sum() for piece in terms.reshape(-1).split(2**17)]).sum()
        return total.float().expand(like.shape) if like.ndim else total.float()
    return terms.double().sum_to_size(like.shape).float()
