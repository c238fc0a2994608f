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

    Returns:
        `[*index.shape, columns]`.

    Raises:
        IndexError: an index is none of the table's.
    """
    if torch.compiler.is_compiling() or not index.is_contiguous() or index.dtype != torch.int64 or not index.numel():
        return None
    kernels = ops.kernels_for(table)
    if (
        not isinstance(kernels, Kernels)
        or not table.is_contiguous()
        or type(index) is not Tensor
        or index.device != table.device
    ):
        return None
    parts = 1
    if isinstance(granularity, PerGroup):
        parts = table.shape[1] // granularity.group_size
        if parts * granularity.group_size != table.shape[1]:
            return None
    if torch.is_grad_enabled() and table.requires_grad:
        found: Tensor | None = _LookedUp.apply(table, index, qparams, grid, parts, reading, kernels)
        return found
    return kernels.fake_quantize_lookup(
        table, index, qparams, (grid.quant_min, grid.quant_max), grid.affine, parts, masked=False, learned=learned
    )[0]


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: Tensor, qparams: Any, grid: Any, parts: Any, reading: Any, kernels: Any
    ) -> Any:
        # With the range of its own extremes, on both sides of a fixed zero, nothing is clipped.
        clips = qparams is not None or grid.affine or not grid.quant_min < 0 < grid.quant_max
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
        return grad, *(None,) * 6
