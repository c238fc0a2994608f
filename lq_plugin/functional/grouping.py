"""The shapes of per-tensor, per-channel and per-group scales: which elements share one.

A weight is laid out as `[C_out, C_in, *kernel]` (each layer brings its own into that order).
`blocks` views it so that one scale tensor broadcasts against it:

| granularity | blocks | scale |
|---|---|---|
| PerTensor | `[O, I, *k]` | `[1, 1, 1...]` |
| PerChannel, axis 0 | `[O, I, *k]` | `[O, 1, 1...]` |
| PerGroup of g | `[O, ceil(I/g), g, *k]` | `[O, ceil(I/g), 1, *k]` |
| PerBlock of b | `[ceil(O/b), b, ceil(I/b), b, *k]` | `[ceil(O/b), 1, ceil(I/b), 1, 1...]` |
| PerMatrix of r rows | `[O / r, r, I, *k]` | `[O / r, 1, 1, 1...]` |
| PerToken (activations) | `[..., I]` | `[..., 1]` |

Groups run along the input channels, for each kernel position apart, as vectors do in VS-Quant
(Dai et al., MLSys 2021) and blocks in ONNX's blocked quantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lq_plugin.intent.spec import Granularity, PerBlock, PerChannel, PerGroup, PerMatrix, PerToken

#: Of MX: what is a block by its format is padded to a whole one.
_LARGEST_BLOCK = 32


def scale_shape(shape: tuple[int, ...], granularity: Granularity, channel_axis: int = 0) -> tuple[int, ...]:
    """Returns the shape of the scales of a tensor, broadcastable to `blocks(x, granularity)`.

    Args:
        shape: of the tensor.
        granularity: what shares a scale.
        channel_axis: the axis of per-channel scales.

    >>> from lq_plugin.intent.spec import PerTensor
    >>> scale_shape((8, 20, 3, 3), PerGroup(16, ragged=True)), scale_shape((8, 20), PerTensor())
    ((8, 2, 1, 3, 3), (1, 1))
    """
    if isinstance(granularity, PerGroup):
        rows, columns, *kernel = shape
        return (rows, -(-columns // granularity.group_size), 1, *kernel)
    if isinstance(granularity, PerBlock):
        rows, columns, *kernel = shape
        return (-(-rows // granularity.size), 1, -(-columns // granularity.size), 1, *[1 for _ in kernel])
    if isinstance(granularity, PerMatrix):
        return (shape[0] // granularity.rows, *[1 for _ in shape])
    if isinstance(granularity, PerToken):
        return (*shape[:-1], 1)
    if isinstance(granularity, PerChannel):
        axis = channel_axis if granularity.axis is None else granularity.axis
        return tuple(size if d == axis % len(shape) else 1 for d, size in enumerate(shape))
    return (1,) * len(shape)


def blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """Returns a view of `x` that the scales broadcast against; a ragged last group is padded with zeros."""
    if isinstance(granularity, PerMatrix):
        return x.reshape(-1, granularity.rows, *x.shape[1:])
    if not isinstance(granularity, (PerGroup, PerBlock)):
        return x
    rows, columns, *kernel = x.shape
    # What is larger than the weight is not padded for nothing, but up to what is a block by its format.
    if isinstance(granularity, PerGroup):
        wide = min(granularity.group_size, max(-(-columns // _LARGEST_BLOCK), 1) * _LARGEST_BLOCK)
    else:
        wide = min(granularity.size, max(columns, 1))
    if short := -columns % wide:
        x = torch.cat([x, x.new_zeros(rows, short, *kernel)], dim=1)
    if isinstance(granularity, PerGroup):
        return x.reshape(rows, -1, wide, *kernel)
    high = min(granularity.size, max(rows, 1))
    if short := -rows % high:
        x = torch.cat([x, x.new_zeros(short, *x.shape[1:])])
    return x.reshape(x.shape[0] // high, high, x.shape[1] // wide, wide, *kernel)


def unblocks(y: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """Returns blocks as a tensor of its original shape, without padding.

    Args:
        y: as `blocks` made it.
        shape: of the tensor.
        granularity: that `blocks` was given.
    """
    if isinstance(granularity, PerBlock):
        rows, columns, *kernel = shape
        return y.reshape(y.shape[0] * y.shape[1], -1, *kernel)[:rows, :columns]
    if isinstance(granularity, PerMatrix):
        return y.flatten(0, 1)
    if not isinstance(granularity, PerGroup):
        return y
    rows, columns, *kernel = shape
    return y.reshape(rows, -1, *kernel)[:, :columns]


def block_mask(shape: tuple[int, ...], granularity: Granularity) -> Tensor | None:
    """Returns boolean blocks, False on padding; None if nothing is padded."""
    inside = blocks(torch.ones(()).expand(shape), granularity)
    return inside > 0 if inside.numel() > math.prod(shape) else None


def has_row_scales(granularity: Granularity) -> bool:
    """Returns True if each row (dim 0) has scales of its own, or all rows share one."""
    if isinstance(granularity, PerGroup):
        return granularity.scale_bits is None
    if isinstance(granularity, PerChannel):
        return granularity.axis in (None, 0)
    return not isinstance(granularity, (PerBlock, PerMatrix))


def to_rows(x: Tensor, scale: tuple[int, ...]) -> Tensor:
    """Returns `[rows, n]`, in row r the elements that share scale number r of a scale tensor of shape `scale`.

    Rows are in the order of `scale.flatten()`.

    >>> to_rows(torch.arange(6).reshape(2, 3), (1, 3))
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    kept = [d for d, size in enumerate(scale) if size > 1]
    reduced = [d for d, size in enumerate(scale) if size == 1]
    count = 1
    for d in kept:
        count *= x.shape[d]
    return x.permute(*kept, *reduced).reshape(count, -1)


def from_rows(rows: Tensor, shape: Sequence[int], scale: tuple[int, ...]) -> Tensor:
    """Returns the elements of `to_rows(x, scale)` in their places.

    Args:
        rows: `[rows, n]`.
        shape: of `x`.
        scale: shape of the scale tensor.

    >>> from_rows(to_rows(torch.arange(6).reshape(2, 3), (1, 3)), (2, 3), (1, 3))
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    order = [d for d, size in enumerate(scale) if size > 1] + reduced_dims(scale)
    return rows.reshape([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


def reduced_dims(scale: tuple[int, ...]) -> list[int]:
    """Returns the dims that a scale tensor of this shape is shared along."""
    return [d for d, size in enumerate(scale) if size == 1]
