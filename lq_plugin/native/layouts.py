"""Layouts of scales, blocks and masks along a tensor in memory, as kernels see it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Dtypes of operands that kernels take.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WORD = 16
#: `LINE` of blocks.cpp.
_LINE = 256


class Layout(NamedTuple):
    """The layout of scales along a tensor in memory, `[repeats, outer, run, inner]`: one for each `(outer, inner)`."""

    repeats: int
    outer: int
    run: int
    inner: int

    @property
    def rows(self) -> tuple[int, int]:
        """Number and length of the runs that begin at a word of a mask."""
        return (
            (self.repeats * self.outer, self.run)
            if self.inner == 1
            else (self.repeats * self.outer * self.run, self.inner)
        )


def is_dense(x: Tensor) -> bool:
    """Returns True if elements neither overlap in memory nor have gaps between them."""
    return x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def layout_of(x: Tensor, sizes: tuple[int, ...]) -> Layout | None:
    """Returns the layout of a contiguous scale along a dense `x`; None if the kernels know no such layout.

    Args:
        x: dense.
        sizes: of the scale, broadcastable to `x`.

    >>> layout_of(torch.zeros(2, 3, 4, 4), (1,))
    Layout(repeats=1, outer=1, run=96, inner=1)
    >>> layout_of(torch.zeros(2, 3, 4, 4), (3, 1, 1))
    Layout(repeats=2, outer=3, run=16, inner=1)
    >>> layout_of(torch.zeros(2, 5, 3), (3,))
    Layout(repeats=1, outer=1, run=10, inner=3)
    """
    if math.prod(sizes) == 1:
        return Layout(1, 1, x.numel(), 1) if len(sizes) <= x.ndim or x.ndim == 0 else None
    if len(sizes) > x.ndim:
        return None
    sizes = (1,) * (x.ndim - len(sizes)) + tuple(sizes)
    order = range(x.ndim) if x.is_contiguous() else sorted(range(x.ndim), key=x.stride, reverse=True)
    # Neighbouring dims that the scale has, or lacks, are one.
    parts: list[tuple[bool, int]] = []
    kept = []
    for dim in order:
        if sizes[dim] not in (1, x.shape[dim]):
            return None  # torch says what is wrong, or makes a larger result
        if x.shape[dim] == 1:
            continue
        has = sizes[dim] > 1
        if has:
            kept.append(dim)
        if parts and parts[-1][0] == has:
            parts[-1] = (has, parts[-1][1] * x.shape[dim])
        else:
            parts.append((has, x.shape[dim]))
    if kept != sorted(kept):
        return None
    flags = [has for has, _ in parts]
    number = [size for _, size in parts]
    known = {
        (True,): lambda a: Layout(1, 1, 1, a),
        (True, False): lambda a, b: Layout(1, a, b, 1),
        (False, True): lambda b, c: Layout(1, 1, b, c),
        (False, True, False): lambda r, a, b: Layout(r, a, b, 1),
        (True, False, True): lambda a, b, c: Layout(1, a, b, c),
        (False, True, False, True): lambda r, a, b, c: Layout(r, a, b, c),
    }
    made = known.get(tuple(flags))
    return None if made is None else made(*number)  # type: ignore[operator]


class BlockLayout(NamedTuple):
    """The layout of channels in memory, `[outer, channels, inner]`."""

    outer: int
    channels: int
    inner: int

    @property
    def mask(self) -> Layout:
        """The layout of a mask: each run of elements begins at a word."""
        return (
            Layout(self.outer, 1, self.channels, 1)
            if self.inner == 1
            else Layout(self.outer * self.channels, 1, self.inner, 1)
        )


def block_layout(x: Tensor, axis: int, block: int) -> BlockLayout | None:
    """Returns the layout of the channels of a dense `x`; None if the kernels cannot take blocks of that size.

    Args:
        x: dense.
        axis: of the channels.
        block: channels of a block.

    >>> block_layout(torch.zeros(2, 3, 4, 4), 1, 16), block_layout(torch.zeros(5, 2, 8), 2, 4)
    (BlockLayout(outer=2, channels=3, inner=16), None)
    """
    order = (
        range(x.ndim)
        if x.is_contiguous()
        else sorted((d for d in range(x.ndim)), key=lambda d: (x.stride(d), -d), reverse=True)
    )
    sizes = [x.shape[d] for d in order]
    at = list(order).index(axis % x.ndim)
    found = BlockLayout(math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :]))
    # Words of a mask would be shared between blocks, or blocks not fit into a line.
    return None if found.inner == 1 and (block % _WORD or block > _LINE) else found


def laid_out(gradient: Tensor, strides: tuple[int, ...] | list[int]) -> Tensor:
    """Returns `gradient` with these strides and no negation to come: itself, or a copy."""
    gradient = gradient.resolve_neg()
    if tuple(gradient.stride()) == tuple(strides):
        return gradient
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def new_mask(x: Tensor, layout: Layout) -> Tensor:
    """Returns an empty mask of this layout, one bit per element, on the device of `x`."""
    rows, length = layout.rows
    return torch.empty(rows * -(-length // _WORD), dtype=torch.int16, device=x.device)
