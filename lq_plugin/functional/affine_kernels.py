"""Fake quantization of `lq_plugin.functional.affine` by compiled kernels, for autograd.

A result may have a smaller dtype than its operand: then the gradient comes in that dtype, and goes on in the operand's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.native import ops
from lq_plugin.native.kernels import TYPES
from lq_plugin.native.layouts import Layout
from lq_plugin.native.switch import FakeQuantizeKernels


class NativeFakeQuantize(torch.autograd.Function):
    """Fake quantization by the kernels: one pass, and one bit per element for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: Any,
        layout: Any,
        extremes: Any,
        kernels: Any,
        dtype: Any,
    ) -> Any:
        if extremes is None:
            y, mask = kernels.fake_quantize(x, scale, zero_point, bounds, layout, masked=True, dtype=dtype)
        else:
            y, mask = kernels.fake_quantize_observed(x, scale, zero_point, bounds, *extremes, masked=True, dtype=dtype)
        ctx.save_for_backward(mask)
        ctx.of = layout, x.stride(), kernels, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return masked_gradient(grad, mask, *ctx.of), *(None,) * 7


class NativeExtremes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Any, grid: Any, covered: Any, kernels: Any, dtype: Any) -> Any:
        bounds, masked = (grid.quant_min, grid.quant_max), ctx.needs_input_grad[0] and not covered
        y, mask, _, _ = kernels.fake_quantize_rows(x, layout.outer, bounds, grid.affine, masked, dtype)
        ctx.of, ctx.covered = (layout, x.stride(), kernels, x.dtype), covered
        if mask is not None:
            ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.covered:
            grad = grad.to(ctx.of[-1])
        else:
            (mask,) = ctx.saved_tensors
            grad = masked_gradient(grad, mask, *ctx.of)
        return grad, *(None,) * 5


def masked_gradient(
    grad: Tensor,
    mask: Tensor,
    layout: Layout,
    strides: tuple[int, ...],
    kernels: FakeQuantizeKernels,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the gradient where a bit of the kernels' `mask` is 1, and 0 elsewhere.

    Args:
        grad: of the output.
        mask: from the forward pass.
        layout: of the mask.
        strides: of the masked tensor, which the result has also.
        kernels: those that made the mask.
        dtype: of the masked tensor, which the result has also; None: the gradient's.
    """
    dtype = grad.dtype if dtype is None else dtype
    if (torch.is_grad_enabled() and grad.requires_grad) or type(grad) is not Tensor or (dtype, grad.dtype) not in TYPES:
        # A second derivative, or what cannot be taken by its address.
        return grad.masked_fill(~ops.unpacked(mask, layout, grad.shape, strides), 0.0).to(dtype)
    # Never in place: the gradient may belong to someone else as well.
    return kernels.mask_gradient(ops.laid_out(grad, strides), mask, layout, dtype)


class TracedFakeQuantize(torch.autograd.Function):
    """Fake quantization by the kernels in a graph of torch.compile."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: Any,
        quant_max: Any,
        observed: Any,
        dtype: Any,
    ) -> Any:
        # The input is kept, not bits of it: after a ReLU its backward pass then needs no mask of bytes, which Inductor
        # writes slowly.
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bounds = quant_min, quant_max
        if not observed:
            return torch.ops.lq_plugin.fake_quantize(x, scale, zero_point, quant_min, quant_max, False, dtype)
        y, *extremes = torch.ops.lq_plugin.fake_quantize_observed(x, scale, zero_point, quant_min, quant_max, dtype)
        ctx.mark_non_differentiable(*extremes)
        return y, *extremes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        return torch.ops.lq_plugin.passed_gradient(grad, *ctx.saved_tensors, *ctx.bounds), *(None,) * 6
