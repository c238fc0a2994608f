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
from lq_plugin.functional.lsq import Band, lsq_gradients
from lq_plugin.intent.spec import Granularity, IntegerGrid, PerGroup
from lq_plugin.native.layouts import Layout
from lq_plugin.native.lookup import LookupKernels, Taken, lookup_kernels
from lq_plugin.native.ops import is_watched
from lq_plugin.native.switch import active


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
    qparams: tuple[Tensor, Tensor | None] | None,
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
    bounds, affine = (grid.quant_min, grid.quant_max), grid.affine
    if qparams is not None and not affine:
        qparams = qparams[0], None
    if not (torch.is_grad_enabled() and table.requires_grad):
        return kernels.look_up(table, index, qparams, bounds, affine, parts, masked=False, learned=learned)[0]
    if (covered or qparams is None) and not affine and bounds[0] < 0 < bounds[1]:
        # With the range of the extremes, on both sides of a fixed zero, nothing is clipped: the gradient is that of
        # rows that are read, whose values alone are others.
        y = read_rows(table, index, reading)
        return kernels.look_up(table, index, qparams, bounds, affine, parts, masked=False, out=y)[0]
    found: Tensor = _LookedUp.apply(table, index, qparams, bounds, affine, parts, reading, kernels)
    return found


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
    sparse_ranges: bool = False,
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
        sparse_ranges: those of scales and zero points are sparse where that of the table is.

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
    sparse = reading.sparse, reading.sparse and sparse_ranges
    y: Tensor = _LearnedLookedUp.apply(
        table, scale, zero_point, index, constants, grid.affine, parts, reading.padding_idx, sparse, kernels
    )
    return y


def _kernels_and_parts(table: Tensor, index: Tensor, granularity: Granularity) -> tuple[LookupKernels | None, int]:
    """Returns the kernels that can look up in a table, and into how many runs with a scale they divide its rows."""
    kernels = lookup_kernels(table, index)
    if kernels is None or not isinstance(granularity, PerGroup):
        return kernels, 1
    parts = table.shape[1] // granularity.group_size
    return (kernels, parts) if parts * granularity.group_size == table.shape[1] else (None, 1)


class _LearnedLookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, scale: Tensor, zero_point: Tensor, index: Tensor, constants: Any, affine: Any,
        parts: Any, padding_idx: Any, sparse: Any, kernels: Any,
    ) -> Any:  # fmt: skip
        y, _, taken = kernels.look_up(
            table,
            index,
            (scale, zero_point if affine else None),
            constants[:2],
            affine,
            parts,
            masked=False,
            learned=True,
            taken=True,
        )
        ctx.save_for_backward(index, *taken)
        # For second derivatives alone. Not saved: what reads a table does not mind if it is written to afterwards.
        ctx.held = table, scale, zero_point
        ctx.of = constants, parts, padding_idx, sparse, kernels
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, *values = ctx.saved_tensors
        table, scale, zero_point = held = ctx.held
        constants, parts, padding_idx, sparse, kernels = ctx.of
        needs = ctx.needs_input_grad[:3]
        watched = torch.is_grad_enabled() and (grad.requires_grad or any(tensor.requires_grad for tensor in held))
        if not watched and _has_address(grad):
            shapes, taken = (table.shape, scale.shape), Taken(*values)
            found = kernels.learned_gradients(
                grad.contiguous(), index, taken, constants, shapes, parts, sparse, needs, padding_idx
            )
            kinds = sparse[0], *[sparse[1] and scale.numel() > 1] * 2
            grads = [
                _sparse(part, index, tensor.shape, padding_idx) if part is not None and kind else part
                for part, tensor, kind in zip(found, held, kinds, strict=True)
            ]
            return grads[0], grads[1] if needs[1] else None, grads[2], *(None,) * 7
        # The values that were read then, with the way back to where they come from.
        rows, scales, zero_points = [
            fresh if value is None else value.view(fresh.shape) + (fresh - fresh.detach())
            for value, fresh in zip(values, _taken(table, scale, zero_point, index), strict=True)
        ]
        if padding_idx is not None:
            grad = grad.masked_fill((index == padding_idx).unsqueeze(-1), 0.0)
        found = lsq_gradients(rows, scales, zero_points, grad.reshape(rows.shape), constants, needs)
        padding_idx = -1 if padding_idx is None else padding_idx
        grads = [
            part
            if part is None
            else part.sum().view(tensor.shape)
            if tensor.numel() == 1
            else torch.ops.aten.embedding_backward.default(
                part.reshape(*index.shape, -1), index, len(tensor), padding_idx, False, False
            ).view(tensor.shape)
            for part, tensor in zip(found, held, strict=True)
        ]
        return *grads, *(None,) * 7


def _sparse(rows: Tensor, index: Tensor, shape: torch.Size, padding_idx: int | None) -> Tensor:
    """Returns a sparse tensor whose rows at `index` are these, but for the padding."""
    places = index.reshape(1, -1)
    if padding_idx is not None:
        others = places[0] != padding_idx
        rows, places = rows[others], places[:, others]
    return torch.sparse_coo_tensor(places, rows, shape, check_invariants=False)


def _has_address(gradient: Tensor) -> bool:
    """Returns False for a second derivative, and where something watches operations."""
    return not (torch.is_grad_enabled() and gradient.requires_grad) and not is_watched(gradient)


def _taken(table: Tensor, scale: Tensor, zero_point: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows at `index`, in runs that share a scale, and the scales and zero points of each."""
    rows = F.embedding(index.reshape(-1), table)
    if scale.numel() == 1:
        return rows, scale.expand(len(rows), 1), zero_point.expand(len(rows), 1)
    scale, zero_point = scales_of_rows(scale, index), scales_of_rows(zero_point, index)
    return rows.view(*scale.shape[:-1], -1), scale, zero_point


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: Tensor, qparams: Any, bounds: Any, affine: Any, parts: Any, reading: Any,
        kernels: Any,
    ) -> Any:  # fmt: skip
        y, mask, _ = kernels.look_up(table, index, qparams, bounds, affine, parts, masked=True)
        ctx.save_for_backward(index, mask)
        ctx.of = table.shape, parts, reading, kernels, active()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, mask = ctx.saved_tensors
        shape, parts, reading, lookups, kernels = ctx.of
        padding_idx, by_frequency, sparse = reading
        rows, length = shape
        if not (sparse or by_frequency) and _has_address(grad):
            return lookups.add_rows(grad.contiguous(), index, mask, shape, parts, padding_idx), *_NONE
        layout = Layout(1, index.numel() * parts, length // parts, 1)
        grad = grad.contiguous()
        grad = masked_gradient(grad, mask, layout, grad.stride(), kernels)
        padding_idx = -1 if padding_idx is None else padding_idx
        return torch.ops.aten.embedding_backward.default(grad, index, rows, padding_idx, by_frequency, sparse), *_NONE


#: Gradients of what is not the table.
_NONE = (None,) * 7
