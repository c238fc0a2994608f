"""Uniform quantization: x̂ = (clip(round(x / scale) + zero_point) - zero_point) · scale.

Shapes: `scale` and `zero_point` broadcast against `x` (`[]`, `[C, 1, 1, 1]`, `[C, G, 1]`, ...).
`round` is half to even; the quotient is `x · (1 / scale)`, as in torch's own fake-quant kernels,
so that results agree with them bit for bit.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018 (arXiv 1712.05877), eqs. 1 and 12; Krishnamoorthi, "Quantizing deep
convolutional networks for efficient inference" (arXiv 1806.08342), section 2.2 for grids without a zero point and
section 2.4 for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.affine_kernels import (
    NativeExtremes,
    NativeFakeQuantize,
    TracedFakeQuantize,
)
from lq_plugin.functional.transforms import applied
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import ops
from lq_plugin.native.kernels import Kernels
from lq_plugin.native.layouts import layout_of
from lq_plugin.native.pass_band import pass_band

#: Scales below this are replaced by it: a constant-zero channel stays representable, and
#: 1 / scale stays finite in float32.
MIN_SCALE = 2.0**-100


def qparams_from_bounds(minimum: Tensor, maximum: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point whose levels cover `[minimum, maximum]`, always with an exact zero.

    Affine: scale = (max - min) / (levels - 1), zero_point = quant_min - round(min / scale), with
    min ≤ 0 ≤ max. Otherwise the zero point is 0 and the scale is the smallest one that
    reaches both bounds: max(max / quant_max, min / quant_min); an unsigned grid clips below zero.

    Args:
        minimum, maximum: float tensors of one shape.
        grid: the integer levels.

    Returns:
        `(scale, zero_point)`, float32 of the same shape; zero points are integers.

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
    """Returns the level of 0 if `minimum` is at the lowest level; 0 on a grid without zero point.

    Args:
        minimum: float32, ≤ 0.
        scale: float32, of the same shape.
        grid: the integer levels.
    """
    if not grid.affine:
        return torch.zeros_like(scale)
    return (grid.quant_min - torch.round(minimum / scale)).clamp(grid.quant_min, grid.quant_max)


def bounds_from_qparams(scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest real value of the levels, shaped like the scale.

    Args:
        scale, zero_point: float32, of one shape.
        grid: the integer levels.
    """
    return (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Returns the integer levels of `x`, int32, in `quant_min..quant_max`, without a gradient.

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, broadcastable to `x`.
        grid: the integer levels.
    """
    q = (x.detach().float() * scale.reciprocal()).round_().add_(zero_point)
    return q.clamp_(grid.quant_min, grid.quant_max).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns the real values of integer levels, (q - zero_point) · scale, float32.

    Args:
        q: integers of any shape.
        scale, zero_point: float32, broadcastable to `q`.
    """
    return (q - zero_point) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, dtype: torch.dtype | None = None
) -> Tensor:
    """Quantizes and dequantizes, with the straight-through gradient.

    Forward:  x̂ = (clip(round(x / s) + z, quant_min, quant_max) - z) · s

    Backward: ∂x̂/∂x = 1 where quant_min ≤ round(x / s) + z ≤ quant_max, else 0; scale and zero
    point are constants (learned ones: `lq_plugin.functional.lsq`).

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, broadcastable to `x`.
        grid: the integer levels.
        dtype: of the result, if not that of `x`.

    Returns:
        Tensor like `x`. The arithmetic is float32 whatever the dtypes, and its result is rounded once, at the end: the
        values are those of float32 `x`, rounded to the dtype.

    >>> x = torch.tensor([-2.0, 0.26, 0.9], requires_grad=True)
    >>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), IntegerGrid(-2, 1)).detach()
    tensor([-1.0000,  0.5000,  0.5000])
    """
    bounds = grid.quant_min, grid.quant_max
    y: Tensor
    if torch.compiler.is_compiling():
        if ops.traceable(x, scale, dtype):
            y = TracedFakeQuantize.apply(x, scale, zero_point, *bounds, None, dtype)
            return y
    elif (found := ops.kernels_for(x, dtype, (scale, zero_point))) is not None and (
        layout := layout_of(x, scale.shape)
    ) is not None:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return found.fake_quantize(x, scale, zero_point, bounds, layout, masked=False, dtype=dtype)[0]
        y = NativeFakeQuantize.apply(x, scale, zero_point, bounds, layout, None, found, dtype)
        return y
    y = applied(_FakeQuantize, x, scale, zero_point, *bounds, False)
    return y.to(dtype or x.dtype)


def fake_quantize_identity(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Quantizes and dequantizes with the gradient ∂x̂/∂x = 1 everywhere, also where x is clipped.

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, broadcastable to `x`.
        grid: the integer levels.

    >>> x = torch.tensor([-2.0, 0.26, 0.9], requires_grad=True)
    >>> fake_quantize_identity(x, torch.tensor(0.5), torch.tensor(0.0), IntegerGrid(-2, 1)).sum().backward()
    >>> x.grad
    tensor([1., 1., 1.])
    """
    y: Tensor = applied(_IdentityFakeQuantize, x, scale, zero_point, grid)
    return y


def fake_quantize_observed(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: IntegerGrid,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `fake_quantize` with one scale, and widens `low..high` in place to the extremes of `x`.

    Args:
        x: float tensor of any shape.
        scale, zero_point: float32, one element.
        grid: the integer levels.
        low, high: float32 `[1]`.
        dtype: of the result, if not that of `x`.

    >>> low, high = torch.tensor([-1.0]), torch.tensor([1.0])
    >>> x, scale, zero_point = torch.tensor([0.2, 3.0]), torch.tensor([0.5]), torch.tensor([0.0])
    >>> fake_quantize_observed(x, scale, zero_point, IntegerGrid(-2, 1), low, high)
    tensor([0.0000, 0.5000])
    >>> low, high
    (tensor([-1.]), tensor([3.]))
    """
    bounds = grid.quant_min, grid.quant_max
    y: Tensor
    if torch.compiler.is_compiling():
        if ops.traceable(x, scale, dtype):
            y, x_low, x_high = TracedFakeQuantize.apply(x, scale, zero_point, *bounds, True, dtype)
            low.copy_(torch.minimum(low, x_low))
            high.copy_(torch.maximum(high, x_high))
            return y
    elif (found := ops.kernels_for(x, dtype, (scale, zero_point))) is not None and (
        scale.numel() == 1 and (layout := layout_of(x, scale.shape)) is not None
    ):
        if not (torch.is_grad_enabled() and x.requires_grad):
            return found.fake_quantize_observed(x, scale, zero_point, bounds, low, high, masked=False, dtype=dtype)[0]
        y = NativeFakeQuantize.apply(x, scale, zero_point, bounds, layout, (low, high), found, dtype)
        return y
    observe(x, low, high)
    y = applied(_FakeQuantize, x, scale, zero_point, *bounds, False)
    return y.to(dtype or x.dtype)


@torch.no_grad()
def observe(x: Tensor, low: Tensor, high: Tensor) -> None:
    """Widens `low..high` in place to the extremes of `x`; a NaN stays.

    Args:
        x: float tensor of any shape.
        low, high: float32 `[1]`.
    """
    # amin and amax, not aminmax: that one is ten times slower on CPU.
    torch.minimum(low, x.amin().float(), out=low)
    torch.maximum(high, x.amax().float(), out=high)


def extremes(x: Tensor, scale_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest of the values that share a scale, without a gradient.

    Args:
        x: float tensor.
        scale_shape: of the scales, with a size of 1 along the dims that share one.

    >>> low, high = extremes(torch.tensor([[1.0, 0.5], [4.0, -8.0]]), (2, 1))
    >>> low.tolist(), high.tolist()
    ([[0.5], [-8.0]], [[1.0], [4.0]])
    """
    x = x.detach()
    if not torch.compiler.is_compiling() and x.is_contiguous() and isinstance(found := ops.kernels_for(x), Kernels):
        # torch reduces short runs an element at a time.
        layout = layout_of(x, scale_shape)
        if layout is not None and layout.repeats == layout.inner == 1:
            low, high = found.row_extremes(x, layout.outer)
            return low.view(scale_shape).to(x.dtype), high.view(scale_shape).to(x.dtype)
    dims = [dim for dim, size in enumerate(scale_shape) if size == 1]
    if not dims:  # torch takes none for all
        return x, x
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def qparams_of(x: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point, float32 `[1]`, whose levels cover all of `x`, as `qparams_from_bounds` has them.

    >>> qparams_of(torch.tensor([[1.0, -2.0]]), IntegerGrid(-2, 1))
    (tensor([1.]), tensor([0.]))
    """
    x = x.detach()
    if not torch.compiler.is_compiling() and isinstance(found := ops.kernels_for(x), Kernels):
        return found.qparams(x, (grid.quant_min, grid.quant_max), grid.affine)
    return qparams_from_bounds(x.amin().view(1), x.amax().view(1), grid)


def fake_quantize_to_extremes(
    x: Tensor, scale_shape: tuple[int, ...], grid: IntegerGrid, dtype: torch.dtype | None = None
) -> Tensor:
    """Quantizes and dequantizes with the range from the smallest to the largest value that share a scale.

    Where the grid has levels on both sides of a fixed zero nothing is clipped, and the gradient passes as it is.

    Args:
        x: float tensor.
        scale_shape: of the scales, with a size of 1 along the dims that share one.
        grid: the integer levels.
        dtype: of the result, if not that of `x`.

    >>> fake_quantize_to_extremes(torch.tensor([[1.0, 0.3], [4.0, -8.0]]), (2, 1), IntegerGrid(-1, 1))
    tensor([[ 1.,  0.],
            [ 0., -8.]])
    """
    covered = not grid.affine and grid.quant_min < 0 < grid.quant_max and grid.quant_max - grid.quant_min < 2**16
    if not torch.compiler.is_compiling() and x.is_contiguous() and (found := ops.kernels_for(x, dtype)) is not None:
        layout = layout_of(x, scale_shape)
        if layout is not None and layout.repeats == layout.inner == 1:
            if torch.is_grad_enabled() and x.requires_grad:
                y: Tensor = NativeExtremes.apply(x, layout, grid, covered, found, dtype)
                return y
            return found.fake_quantize_rows(
                x, layout.outer, (grid.quant_min, grid.quant_max), grid.affine, masked=False, dtype=dtype
            )[0]
    scale, zero_point = qparams_from_bounds(*extremes(x, scale_shape), grid)
    y = applied(_FakeQuantize, x, scale, zero_point, grid.quant_min, grid.quant_max, covered)
    return y.to(dtype or x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Any, quant_max: Any, covered: Any
    ) -> Any:
        ctx.covered = covered  # Nothing is clipped, and nothing saved.
        if not covered:
            ctx.save_for_backward(x, scale, zero_point)
            ctx.quant_min, ctx.quant_max = quant_min, quant_max
        # clip(r + z) - z is clip(r, qmin - z, qmax - z): all are integers, exact in float32.
        if scale.numel() == 1 and _has_cheap_scalars(x, scale, zero_point):
            low, high = quant_min - zero_point.item(), quant_max - zero_point.item()
            return (x * scale.reciprocal().item()).round_().clamp_(low, high).mul_(scale.item())
        y = (x.float() * scale.reciprocal()).round_()
        return torch.clamp_(y, quant_min - zero_point, quant_max - zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.covered:
            return grad, *(None,) * 5
        # From the saved input: no mask tensor is kept between forward and backward.
        x, scale, zero_point = ctx.saved_tensors
        if _has_cheap_scalars(x, scale, zero_point):
            low, high = pass_band(scale.item(), ctx.quant_min - zero_point.item(), ctx.quant_max - zero_point.item())
            # One vectorised kernel for grad · 1{low < x < high}.
            return torch.ops.aten.hardtanh_backward(grad, x, low, high), *(None,) * 5
        r = (x.float() * scale.reciprocal()).round_()
        outside = (r < ctx.quant_min - zero_point).logical_or_(r > ctx.quant_max - zero_point)
        return grad.masked_fill(outside, 0.0), *(None,) * 5


class _IdentityFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Any) -> Any:
        return fake_quantize(x, scale, zero_point, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None, None


def _has_cheap_scalars(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Returns True if Python numbers may replace the qparams: scalar kernels are several times faster on CPU.

    On other devices reading them would wait for the device, and under torch.compile it breaks the graph.
    """
    if torch.compiler.is_compiling() or x.dtype != torch.float32:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(scale):  # it may be a batch of scales
        return False
    return scale.numel() == 1 and zero_point.numel() == 1 and scale.device.type == x.device.type == "cpu"
