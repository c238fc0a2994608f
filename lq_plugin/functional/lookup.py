"""Rows of a table, quantized as they are read: an embedding costs what is read of it, however large the table.

Forward:  y_i = Q(W)[index_i], where Q takes one scale for all of W, one for each row, or one for each group of a row.

Backward: ∂L/∂W is that of a lookup, of the gradient of y where W was not clipped (straight through); dense, or sparse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lq_plugin.functional.affine_kernels import masked_gradient
from lq_plugin.functional.lsq import Band, learned_gradients
from lq_plugin.intent.spec import Granularity, IntegerGrid, PerGroup
from lq_plugin.native import ops
from lq_plugin.native.kernels import Kernels
from lq_plugin.native.layouts import Layout


class Reading(NamedTuple):
    """Options of reading a table, named as in `torch.nn.functional.embedding`."""

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    sparse: bool = False


def read_rows(table: Tensor, index: Tensor, reading: Reading) -> Tensor:
    """Returns `table[index]` with the gradient that `reading` asks for.

    Args:
        table: `[rows, columns]`.
        index: integers of any shape.
        reading: how gradients come back.
    """
    return F.embedding(index, table, reading.padding_idx, None, 2.0, reading.scale_grad_by_freq, reading.sparse)


def scales_of_rows(scale: Tensor, index: Tensor) -> Tensor:
    """Returns the scales of the rows at `index`, flattened: one for each row, or the one that all share.

    >>> scales_of_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 1, 0])).tolist()
    [[2.0], [2.0], [1.0]]
    """
    if scale.numel() == 1:
        return scale
    return F.embedding(index.reshape(-1), scale.flatten(1)).view(-1, *scale.shape[1:])


def fake_quantize_rows(
    table: Tensor,
    index: Tensor,
    qparams: tuple[Tensor, Tensor] | None,
    grid: IntegerGrid,
    granularity: Granularity,
    reading: Reading,
    learned: bool = False,
    covered: bool = False,
) -> Tensor | None:
    """Returns the rows at `index` of a fake-quantized table, in one pass; None if the kernels cannot take the tensors.

    Args:
        table: `[rows, columns]`.
        index: integers of any shape.
        qparams: scale and zero point; None: those of the extremes of each row, or group of one.
        grid: the integer levels.
        granularity: of the scales.
        reading: how gradients come back.
        learned: the qparams are those of LSQ, which have no gradients here.
        covered: the qparams are those of the extremes of the table.

    Returns:
        `[*index.shape, columns]`.

    Raises:
        IndexError: an index is none of the table's.
    """
    kernels, parts = _kernels_and_parts(table, index, granularity)
    if kernels is None:
        return None
    if torch.is_grad_enabled() and table.requires_grad:
        found: Tensor | None = _LookedUp.apply(
            table, index, qparams, covered or qparams is None, grid, parts, reading, kernels
        )
        return found
    return kernels.fake_quantize_lookup(
        table, index, qparams, (grid.quant_min, grid.quant_max), grid.affine, parts, masked=False, learned=learned
    )[0]


def fake_quantize_learned_rows(
    table: Tensor,
    index: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: IntegerGrid,
    granularity: Granularity,
    gradient_factor: float,
    band: Band,
    reading: Reading,
) -> Tensor | None:
    """Returns the rows at `index` of a table whose step sizes are learned, with gradients for all three (LSQ).

    What a row's scale learns is what is read of the row; the padding teaches it nothing.

    Args:
        table: `[rows, columns]`.
        index: integers of any shape.
        scale, zero_point: `[rows, 1]`, `[rows, groups, 1]`, or of one element.
        grid: the integer levels.
        granularity: of the scales.
        gradient_factor, band: see `fake_quantize_learned`.
        reading: how gradients come back.

    Returns:
        `[*index.shape, columns]`; None if the kernels cannot take the tensors.

    Raises:
        IndexError: an index is none of the table's.
    """
    kernels, parts = _kernels_and_parts(table, index, granularity)
    if kernels is None:
        return None
    if scale.numel() == 1:
        parts = 1
    constants = grid.quant_min, grid.quant_max, gradient_factor, band == "rounded"
    y: Tensor = _LearnedLookedUp.apply(table, scale, zero_point, index, constants, parts, reading, kernels)
    return y


def _kernels_and_parts(table: Tensor, index: Tensor, granularity: Granularity) -> tuple[Kernels | None, int]:
    """Returns the kernels that can look up in a table, and into how many runs with a scale they divide its rows."""
    if torch.compiler.is_compiling() or not index.is_contiguous() or index.dtype != torch.int64 or not index.numel():
        return None, 1
    kernels = ops.kernels_for(table)
    if (
        not isinstance(kernels, Kernels)
        or not table.is_contiguous()
        or type(index) is not Tensor
        or index.device != table.device
    ):
        return None, 1
    if not isinstance(granularity, PerGroup):
        return kernels, 1
    parts = table.shape[1] // granularity.group_size
    return (kernels, parts) if parts * granularity.group_size == table.shape[1] else (None, 1)


class _LearnedLookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, scale: Tensor, zero_point: Tensor, index: Tensor, constants: Any, parts: Any,
        reading: Any, kernels: Any,
    ) -> Any:  # fmt: skip
        taken = _taken(table, scale, zero_point, index)
        count = index.numel() * parts
        layout = (
            Layout(1, 1, taken[0].numel(), 1) if scale.numel() == 1 else Layout(1, count, len(table[0]) // parts, 1)
        )
        y = kernels.fake_quantize(*taken, constants[:2], layout, masked=False, learned=True)[0]
        ctx.save_for_backward(index, *taken)
        # For second derivatives alone. Not saved: what reads a table does not mind if it is written to afterwards.
        ctx.held = table, scale, zero_point
        ctx.of, ctx.reading, ctx.kernels = (constants, layout), reading, kernels
        return y.view(*index.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, *values = ctx.saved_tensors
        table, scale, zero_point = held = ctx.held
        if torch.is_grad_enabled() and (grad.requires_grad or any(tensor.requires_grad for tensor in held)):
            # The values that were read then, with the way back to where they come from.
            now = _taken(table, scale, zero_point, index)
            values = [value + (fresh - fresh.detach()) for value, fresh in zip(values, now, strict=True)]
        padding_idx, by_frequency, sparse = ctx.reading
        if padding_idx is not None:
            grad = grad.masked_fill((index == padding_idx).unsqueeze(-1), 0.0)
        rows, scales, zero_points = values
        constants, layout = ctx.of
        needs = ctx.needs_input_grad[:3]
        found = learned_gradients(
            rows, scales, zero_points, grad.reshape(rows.shape), constants, layout, needs, ctx.kernels
        )
        grads: list[Tensor | None] = []
        for tensor, gradient in zip(held, found, strict=True):
            if gradient is not None and (tensor is table or tensor.numel() > 1):
                # Dense, of scales: the optimizer that adopts them may be none for sparse ones.
                gradient = torch.ops.aten.embedding_backward(
                    gradient.view(*index.shape, -1),
                    index,
                    len(tensor),
                    -1 if padding_idx is None else padding_idx,
                    by_frequency,
                    sparse and tensor is table,
                )
            grads.append(gradient if gradient is None or gradient.is_sparse else gradient.view(tensor.shape))
        return *grads, *(None,) * 5


def _taken(table: Tensor, scale: Tensor, zero_point: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows at `index`, in runs that share a scale, and the scales and zero points of each, or of all."""
    rows = F.embedding(index.reshape(-1), table)
    if scale.numel() == 1:
        return rows, scale.view(1, 1), zero_point.view(1, 1)
    scale, zero_point = scales_of_rows(scale, index), scales_of_rows(zero_point, index)
    return rows.view(*scale.shape[:-1], -1), scale, zero_point


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: Tensor, qparams: Any, covered: Any, grid: Any, parts: Any, reading: Any,
        kernels: Any,
    ) -> Any:  # fmt: skip
        # With the range of the extremes, on both sides of a fixed zero, nothing is clipped.
        clips = not covered or grid.affine or not grid.quant_min < 0 < grid.quant_max
        bounds = grid.quant_min, grid.quant_max
        y, mask = kernels.fake_quantize_lookup(table, index, qparams, bounds, grid.affine, parts, masked=clips)
        ctx.save_for_backward(index, mask)
        ctx.layout = Layout(1, index.numel() * parts, table.shape[1] // parts, 1)
        ctx.rows, ctx.strides, ctx.reading, ctx.kernels = table.shape[0], y.stride(), reading, kernels
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, mask = ctx.saved_tensors
        if mask is not None:
            grad = masked_gradient(grad, mask, ctx.layout, ctx.strides, ctx.kernels)
        padding_idx, by_frequency, sparse = ctx.reading
        padding_idx = -1 if padding_idx is None else padding_idx
        grad = torch.ops.aten.embedding_backward(grad, index, ctx.rows, padding_idx, by_frequency, sparse)
        return grad, *(None,) * 7
