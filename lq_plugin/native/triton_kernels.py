"""The kernels on GPUs, in Triton: what `fake_quantize.cpp` does, with the same numbers and the same masks.

A program takes a tile of `[ROWS, COLUMNS]` elements, rows being the runs that begin at a word of a mask. Nothing waits
for the device. Products and sums are rounded one by one (`enable_fp_fusion=False`), quotients correctly (`div_rn`): the
compiler's own choice, fused and approximate, would move values at the middle between two levels.

In Triton's interpreter (`TRITON_INTERPRET=1` before this module is imported) the same kernels run on CPU tensors,
slowly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lq_plugin.native.layouts import Layout, new_mask

#: Elements of a program, and the most of them in one row.
_TILE, _WIDEST = 2048, 2048
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# From here on every float32 is an integer.
_WHOLE = tl.constexpr(2.0**23)
_MIN_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def round_half_even(x):
    """Rounds half to even, by adding a number that leaves no fraction bits; a zero keeps its sign, a NaN stays."""
    magnitude = tl.abs(x)
    whole = (magnitude + _WHOLE) - _WHOLE
    whole = tl.where(magnitude < _WHOLE, whole, magnitude)
    # By the sign bit, which a comparison with 0 does not see in -0.
    negative = x.to(tl.int32, bitcast=True) < 0
    return tl.where(negative, -whole, whole)


@triton.jit
def clip_levels(x, low, high):
    """Clips `x` to `low..high`; a NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _place(rows, length, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns row and column indices of this program's tile, and which of them are within the tensor."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % parts) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, (row < rows)[:, None] & (column < length)[None, :]


@triton.jit
def _qparams(row, column, valid, outer, run, inner, rows, IN_COLUMNS: tl.constexpr):
    """Returns the offsets of a tile's scales, one per row or one per column, and which of them exist."""
    if IN_COLUMNS:
        at = ((row // run) % outer)[:, None] * inner + column[None, :]
        there = valid
    else:
        at = (row % outer)[:, None]
        there = (row < rows)[:, None]
    return at, there


@triton.jit
def _acting(scale, zero_point, quant_min, quant_max):
    """Returns learned qparams as they act: the magnitude of the scale, the rounded zero point."""
    magnitude = tl.abs(scale)
    magnitude = tl.where(magnitude < _MIN_SCALE, _MIN_SCALE, magnitude)
    return magnitude, clip_levels(round_half_even(zero_point), quant_min, quant_max)


@triton.jit
def inverse_of(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _over(x, number):
    """Returns x / number, for a number that is the same for all elements."""
    return tl.div_rn(x, tl.zeros_like(x) + number)


@triton.jit
def range_qparams(low, high, quant_min, quant_max, AFFINE: tl.constexpr):
    """Returns what `qparams_from_bounds` of lq_plugin/functional/affine.py does."""
    low, high = tl.where(low > 0.0, 0.0, low), tl.where(high < 0.0, 0.0, high)
    zero_point = tl.zeros_like(low)
    if AFFINE:
        steps = quant_max - quant_min
        scale = _over(high, steps) - _over(low, steps)
        scale = tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)
        zero_point = clip_levels(quant_min - round_half_even(tl.div_rn(low, scale)), quant_min, quant_max)
    else:
        scale = tl.zeros_like(low)
        if quant_max > 0:
            scale = _over(high, quant_max)
        if quant_min < 0:
            other = _over(low, quant_min)
            scale = tl.where((other > scale) | (other != other), other, scale)
        scale = tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)
    return scale, zero_point


@triton.jit
def _store_bits(mask_at, inside, row, column, length, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores one bit per element, in words of 16 that begin anew at each row."""
    words = (length + 15) // 16
    bits = tl.reshape(inside.to(tl.int32), (ROWS, COLUMNS // 16, 16)) << tl.arange(0, 16)[None, None, :]
    word = tl.min(tl.reshape(column, (COLUMNS // 16, 16)), axis=1) // 16
    there = (row < rows)[:, None] & (word < words)[None, :]
    tl.store(mask_at + row[:, None] * words + word[None, :], tl.sum(bits, axis=2).to(tl.int16), mask=there)


@triton.jit(do_not_specialize=["rows", "parts", "outer", "run", "inner"])
def _forward(
    x_at, y_at, mask_at, scale_at, zero_at, low_at, high_at, rows, length, parts, outer, run, inner, quant_min,
    quant_max,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_COLUMNS: tl.constexpr, LEARNED: tl.constexpr, MASKED: tl.constexpr,
    OBSERVED: tl.constexpr, FROM_EXTREMES: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    row, column, valid = _place(rows, length, parts, ROWS, COLUMNS)
    place = row[:, None] * length + column[None, :]
    x = tl.load(x_at + place, mask=valid, other=0.0).to(tl.float32)
    at, there = _qparams(row, column, valid, outer, run, inner, rows, IN_COLUMNS)
    if FROM_EXTREMES:
        low, high = tl.load(low_at + at, mask=there, other=0.0), tl.load(high_at + at, mask=there, other=0.0)
        scale, zero_point = range_qparams(low.to(tl.float32), high.to(tl.float32), quant_min, quant_max, AFFINE)
        if tl.program_id(0) % parts == 0:
            tl.store(scale_at + at, scale, mask=there)
            tl.store(zero_at + at, zero_point, mask=there)
    else:
        scale, zero_point = tl.load(scale_at + at, mask=there, other=1.0), tl.load(zero_at + at, mask=there, other=0.0)
    if LEARNED:
        scale, zero_point = _acting(scale, zero_point, quant_min, quant_max)
    low, high = quant_min - zero_point, quant_max - zero_point
    level = round_half_even(x * inverse_of(scale))
    tl.store(y_at + place, (clip_levels(level, low, high) * scale).to(y_at.dtype.element_ty), mask=valid)
    if MASKED:
        inside = valid & ~((level < low) | (level > high))
        _store_bits(mask_at, inside, row, column, length, rows, ROWS, COLUMNS)
    if OBSERVED:
        # Each program leaves its own extremes, which one more looks through.
        broken = tl.max(tl.max((valid & (x != x)).to(tl.int32), axis=1), axis=0) > 0
        known = valid & (x == x)
        smallest = tl.min(tl.min(tl.where(known, x, float("inf")), axis=1), axis=0)
        largest = tl.max(tl.max(tl.where(known, x, float("-inf")), axis=1), axis=0)
        tl.store(low_at + tl.program_id(0), tl.where(broken, float("nan"), smallest))
        tl.store(high_at + tl.program_id(0), tl.where(broken, float("nan"), largest))


@triton.jit(do_not_specialize=["number"])
def _take_in(low_at, high_at, lows_at, highs_at, number, BLOCK: tl.constexpr):
    """Widens `low..high` to all of `lows` and `highs`; a NaN stays."""
    low, high = tl.load(low_at), tl.load(high_at)
    broken = (low != low) | (high != high)
    for start in range(0, number, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lows = tl.load(lows_at + at, mask=at < number, other=float("inf"))
        highs = tl.load(highs_at + at, mask=at < number, other=float("-inf"))
        broken = broken | (tl.max((lows != lows).to(tl.int32), axis=0) > 0)
        low = tl.minimum(low, tl.min(lows, axis=0))
        high = tl.maximum(high, tl.max(highs, axis=0))
    tl.store(low_at, tl.where(broken, float("nan"), low))
    tl.store(high_at, tl.where(broken, float("nan"), high))


@triton.jit(do_not_specialize=["rows", "parts"])
def mask_gradient(gradient_at, result_at, mask_at, rows, length, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, valid = _place(rows, length, parts, ROWS, COLUMNS)
    place = row[:, None] * length + column[None, :]
    words = (length + 15) // 16
    word = tl.load(mask_at + row[:, None] * words + (column // 16)[None, :], mask=valid, other=0)
    inside = (word.to(tl.int32) >> (column % 16)[None, :]) & 1
    gradient = tl.load(gradient_at + place, mask=valid, other=0.0)
    tl.store(result_at + place, tl.where(inside != 0, gradient, 0.0).to(result_at.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "parts", "outer"])
def _learned_backward(
    x_at, gradient_at, result_at, scale_at, zero_at, slope_at, shift_at, rows, length, parts, outer, quant_min,
    quant_max,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_SHIFT: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    row, column, valid = _place(rows, length, parts, ROWS, COLUMNS)
    place = row[:, None] * length + column[None, :]
    at, there = (row % outer)[:, None], (row < rows)[:, None]
    scale, zero_point = tl.load(scale_at + at, mask=there, other=1.0), tl.load(zero_at + at, mask=there, other=0.0)
    scale, zero_point = _acting(scale, zero_point, quant_min, quant_max)
    ratio = tl.load(x_at + place, mask=valid, other=0.0).to(tl.float32) * inverse_of(scale)
    gradient = tl.load(gradient_at + place, mask=valid, other=0.0)
    rounded = round_half_even(ratio)
    low, high = quant_min - zero_point, quant_max - zero_point
    level = clip_levels(rounded, low, high)
    # A NaN is outside.
    outside = (level != rounded) | (rounded != rounded) if ROUNDED else ~((ratio > low) & (ratio < high))
    # Inside: round(v/s) - v/s. Outside only the clipped level is left.
    term = gradient.to(tl.float32) * tl.where(outside, level, level - ratio)
    slope = tl.sum(tl.where(valid, term, 0.0).to(tl.float64), axis=1)
    tl.store(slope_at + row * parts + tl.program_id(0) % parts, slope, mask=row < rows)
    if NEEDS_SHIFT:
        term = tl.where(valid & outside, gradient.to(tl.float32) * -scale, 0.0)
        tl.store(
            shift_at + row * parts + tl.program_id(0) % parts, tl.sum(term.to(tl.float64), axis=1), mask=row < rows
        )
    if NEEDS_X:
        tl.store(result_at + place, tl.where(outside, 0.0, gradient).to(result_at.dtype.element_ty), mask=valid)


class TritonKernels:
    """The kernels of GPUs, see `lq_plugin.native.kernels.Kernels`.

    The arithmetic is float32; results are rounded to their dtype as they are stored.
    """

    variant = "triton"

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        layout: Layout,
        masked: bool,
        learned: bool = False,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        y = torch.empty_like(x, dtype=dtype) if out is None else out
        mask = new_mask(x, layout) if masked else None
        self._run_forward(x, y, mask, scale, zero_point, bounds, layout, learned=learned)
        return y, mask

    def fake_quantize_observed(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        low: Tensor,
        high: Tensor,
        masked: bool,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        layout = Layout(1, 1, x.numel(), 1)
        y = torch.empty_like(x, dtype=dtype) if out is None else out
        mask = new_mask(x, layout) if masked else None
        programs = tile_sizes(layout)[0]
        lows, highs = torch.empty(2, programs, dtype=torch.float32, device=x.device)
        self._run_forward(x, y, mask, scale, zero_point, bounds, layout, extremes=(lows, highs), observed=True)
        with device_of(x):
            _take_in[1,](low, high, lows, highs, programs, BLOCK=1024, **_OPTIONS)
        return y, mask

    def fake_quantize_rows(
        self,
        x: Tensor,
        rows: int,
        bounds: tuple[int, int],
        affine: bool,
        masked: bool,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        layout = Layout(1, rows, x.numel() // rows, 1)
        y = torch.empty_like(x, dtype=dtype)
        mask = new_mask(x, layout) if masked else None
        scale, zero_point = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        low, high = x.detach().view(rows, -1).aminmax(dim=1)
        self._run_forward(x, y, mask, scale, zero_point, bounds, layout, extremes=(low, high), affine=affine)
        return y, mask, scale, zero_point

    def mask_gradient(self, gradient: Tensor, mask: Tensor, layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
        result = torch.empty_like(gradient, dtype=dtype)
        programs, parts, rows, columns = tile_sizes(layout)
        with device_of(gradient):
            mask_gradient[programs,](
                gradient, result, mask, *layout.rows, parts, ROWS=rows, COLUMNS=columns, **_OPTIONS
            )
        return result

    def keep(self, gradient: Tensor, mask: Tensor, layout: Layout) -> None:
        programs, parts, rows, columns = tile_sizes(layout)
        with device_of(gradient):
            mask_gradient[programs,](
                gradient, gradient, mask, *layout.rows, parts, ROWS=rows, COLUMNS=columns, **_OPTIONS
            )

    def learned_backward(
        self, x: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], rounded: bool,
        layout: Layout,
        needs_x: bool, needs_zero_point: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        programs, parts, rows, columns = tile_sizes(layout)
        result = torch.empty_like(x) if needs_x else None
        slope = torch.empty(layout.repeats, layout.outer, parts, dtype=torch.float64, device=x.device)
        shift = torch.empty_like(slope) if needs_zero_point else None
        with device_of(x):
            _learned_backward[programs,](
                x, gradient, x if result is None else result, scale, zero_point, slope,
                slope if shift is None else shift, *layout.rows,
                parts, layout.outer, *map(float, bounds), ROWS=rows, COLUMNS=columns, NEEDS_X=needs_x,
                NEEDS_SHIFT=needs_zero_point,
                ROUNDED=rounded, **_OPTIONS,
            )  # fmt: skip
        return result, slope.sum((0, 2)), None if shift is None else shift.sum((0, 2))

    @staticmethod
    def _run_forward(
        x: Tensor, y: Tensor, mask: Tensor | None, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int],
        layout: Layout,
        extremes: tuple[Tensor, Tensor] | None = None, learned: bool = False, observed: bool = False,
        affine: bool = False,
    ) -> None:  # fmt: skip
        programs, parts, rows, columns = tile_sizes(layout)
        # What a kernel does not touch still takes a place among its arguments.
        low, high = (scale, scale) if extremes is None else extremes
        with device_of(x):
            _forward[programs,](
                x, y, x if mask is None else mask, scale, zero_point, low, high, *layout.rows, parts, layout.outer,
                layout.run,
                layout.inner, *map(float, bounds), ROWS=rows, COLUMNS=columns, IN_COLUMNS=layout.inner > 1,
                LEARNED=learned,
                MASKED=mask is not None, OBSERVED=observed, FROM_EXTREMES=extremes is not None and not observed,
                AFFINE=affine, **_OPTIONS,
            )  # fmt: skip


def tile_sizes(layout: Layout) -> tuple[int, int, int, int]:
    """Returns the number of programs, how many of them share a row, and rows and columns of a tile."""
    rows, length = layout.rows
    columns = min(_WIDEST, max(16, triton.next_power_of_2(length)))
    height = min(_TILE // columns, triton.next_power_of_2(rows))
    parts = triton.cdiv(length, columns)
    return triton.cdiv(rows, height) * parts, parts, height, columns


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context with the device of `x` as the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
