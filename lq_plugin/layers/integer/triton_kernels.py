"""Triton kernels of the integer forward pass on GPUs.

They do what `integer.cpp` does, with the same numbers, and compute the products.

A level is kept less 128 as an int8, for tensor cores multiply int8 with int8. Products and sums of floats are rounded
one by one, quotients correctly, as in lq_plugin/native/triton_kernels.py. Nothing waits for the device: scales and zero
points stay there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lq_plugin.native.triton_kernels import clip_levels, inverse_of, range_qparams, round_half_even

#: How the sums of `multiply` run along taps of the kernel and channels: over both as one index; over one tap; a step is
#: within one tap.
MIXED, ONE_TAP, WITHIN_TAP = 0, 1, 2
_ONE_TAP, _WITHIN_TAP = tl.constexpr(ONE_TAP), tl.constexpr(WITHIN_TAP)


@triton.jit
def _extremes(x, there):
    """Smallest and largest element, and whether there is a NaN."""
    known = there & (x == x)
    low = tl.min(tl.where(known, x, float("inf")), axis=0)
    high = tl.max(tl.where(known, x, float("-inf")), axis=0)
    return low, high, tl.max((there & (x != x)).to(tl.int32), axis=0)


@triton.jit
def _as_integer(level):
    """A NaN, which is no level, becomes 0."""
    return tl.where(level == level, level, 0.0).to(tl.int32)


@triton.jit
def quantize(
    x_at, q_at, mask_at, scale_at, zero_at, lows_at, highs_at, number, quant_min, quant_max, MASKED: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Quantizes `number` elements in the order of memory.

    Each program leaves its extremes for `settle`, NaN where it met one.
    """
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < number
    x = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
    one = tl.arange(0, 1)
    zero_point = tl.load(zero_at + one)
    low, high = quant_min - zero_point, quant_max - zero_point
    level = round_half_even(x * inverse_of(tl.load(scale_at + one)))
    shift = (zero_point - quant_min).to(tl.int32) - 128
    tl.store(q_at + place, (_as_integer(clip_levels(level, low, high)) + shift).to(tl.int8), mask=there)
    if MASKED:
        inside = there & ~((level < low) | (level > high))
        bits = tl.reshape(inside.to(tl.int32), (BLOCK // 16, 16)) << tl.arange(0, 16)[None, :]
        word = program.to(tl.int64) * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
        tl.store(mask_at + word, tl.sum(bits, axis=1).to(tl.int16), mask=word < (number + 15) // 16)
    smallest, largest, broken = _extremes(x, there)
    tl.store(lows_at + program, tl.where(broken > 0, float("nan"), smallest))
    tl.store(highs_at + program, tl.where(broken > 0, float("nan"), largest))


@triton.jit(do_not_specialize=["programs"])
def settle(
    scale_at, zero_at, qparams_at, lows_at, highs_at, low_at, high_at, programs, quant_min, OBSERVED: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Merges the extremes that the programs of `quantize` left.

    The running extremes take in theirs. The qparams are the scale, NaN where there was a NaN, which reaches all that is
    computed from it, and the zero point of the int8 levels.
    """
    low, high, broken = float("inf"), float("-inf"), 0
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < programs
        lows, _, nan = _extremes(tl.load(lows_at + at, mask=there, other=0.0), there)
        _, highs, _ = _extremes(tl.load(highs_at + at, mask=there, other=0.0), there)
        low, high, broken = tl.minimum(low, lows), tl.maximum(high, highs), tl.maximum(broken, nan)
    tl.store(qparams_at, tl.where(broken > 0, float("nan"), tl.load(scale_at)))
    tl.store(qparams_at + 1, tl.load(zero_at) - quant_min - 128.0)
    if OBSERVED:
        last_low, last_high = tl.load(low_at), tl.load(high_at)
        broken = (broken > 0) | (last_low != last_low) | (last_high != last_high)
        tl.store(low_at, tl.where(broken, float("nan"), tl.minimum(low, last_low)))
        tl.store(high_at, tl.where(broken, float("nan"), tl.maximum(high, last_high)))


@triton.jit
def quantize_rows(
    w_at, q_at, scale_at, sums_at, given_at, low_at, high_at, length, quant_min, quant_max, given_step,
    LIVE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program, on a grid with zero point 0: levels, their sum, and the scale.

    LIVE: the scale is that of the row's extremes, or of `low_at` and `high_at` where TOGETHER; else it is given. A row
        with a NaN
    gets the scale NaN.
    """
    row = tl.program_id(0)
    begin = row.to(tl.int64) * length
    column = tl.arange(0, BLOCK)
    low, high, broken = float("inf"), float("-inf"), 0
    for start in range(0, length, BLOCK):
        there = start + column < length
        w = tl.load(w_at + begin + start + column, mask=there, other=0.0).to(tl.float32)
        lows, highs, nan = _extremes(w, there)
        low, high, broken = tl.minimum(low, lows), tl.maximum(high, highs), tl.maximum(broken, nan)
    one = tl.arange(0, 1)
    if LIVE:
        if TOGETHER:
            low, high = tl.load(low_at).to(tl.float32), tl.load(high_at).to(tl.float32)
        scale, _ = range_qparams(
            low + tl.zeros((1,), tl.float32), high + tl.zeros((1,), tl.float32), quant_min, quant_max, False
        )
    else:
        scale = tl.load(given_at + row * given_step + one)
    scale = tl.where(broken > 0, float("nan"), scale)
    tl.store(scale_at + row + one, scale)
    inverse = inverse_of(scale)
    total = 0
    for start in range(0, length, BLOCK):
        there = start + column < length
        w = tl.load(w_at + begin + start + column, mask=there, other=0.0).to(tl.float32)
        level = _as_integer(clip_levels(round_half_even(w * inverse), quant_min, quant_max))
        tl.store(q_at + begin + start + column, level.to(tl.int8), mask=there)
        total += tl.sum(tl.where(there, level, 0), axis=0)
    tl.store(sums_at + row, total)


@triton.jit
def dequantize(q_at, y_at, scale_at, zero_at, number, BLOCK: tl.constexpr):
    """(q - zero_point) · scale, rounded once."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < number
    q = tl.load(q_at + place, mask=there, other=0).to(tl.float32)
    y = (q - tl.load(zero_at)) * tl.load(scale_at)
    tl.store(y_at + place, y.to(y_at.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def multiply(
    q_at, w_at, y_at, scale_at, zero_at, weight_scale_at, sums_at, bias_at, rows, columns, depth, channels, height,
    width, out_height,
    out_width, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, TAPS: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """Convolves by a product of matrices read in place: y = s_x · s_w · (Σ q_x · q_w - z · Σ q_w) + b.

    q `[N, H, W, C]`, w `[C_out, K_h, K_w, C]`, y `[N, H_out, W_out, C_out]`; `rows` is N · H_out · W_out, `depth` K_h ·
    K_w · C. A linear layer has one pixel an image. TAPS: see `MIXED`; PADDED: some taps lie outside of the image, where
    the level is that of 0;
    EVEN: `depth` is a multiple of DEPTH.
    """
    # BAND tiles that lie below each other run at the same time: they read the same weights.
    program = tl.program_id(0)
    tiles = BAND * tl.cdiv(columns, COLUMNS)
    first = program // tiles * BAND
    in_band = tl.minimum(tl.cdiv(rows, ROWS) - first, BAND)
    row = (first + program % tiles % in_band) * ROWS + tl.arange(0, ROWS)
    column = program % tiles // in_band * COLUMNS + tl.arange(0, COLUMNS)
    # What lies beyond the last one is the last one again; it is not stored.
    pixel = tl.minimum(row, rows - 1)
    image, pixel = pixel // (out_height * out_width), pixel % (out_height * out_width)
    top, left = pixel // out_width * stride_y - padding_y, pixel % out_width * stride_x - padding_x
    q_from = (((image.to(tl.int64) * height + top) * width + left) * channels)[:, None]
    w_from = (tl.minimum(column, columns - 1).to(tl.int64) * depth)[None, :]
    zero = tl.load(zero_at).to(tl.int32)
    step = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, depth, DEPTH):
        if TAPS == _ONE_TAP:
            down, right, channel = 0, 0, (start + step)[None, :]
        elif TAPS == _WITHIN_TAP:
            tap = start // channels
            down, right = tap // kernel_width * dilation_y, tap % kernel_width * dilation_x
            channel = (start % channels + step)[None, :]
        else:
            tap = ((start + step) // channels)[None, :]
            down, right = tap // kernel_width * dilation_y, tap % kernel_width * dilation_x
            channel = ((start + step) % channels)[None, :]
        q_here = q_at + q_from + ((down * width + right) * channels + channel)
        w_here = w_at + w_from + (start + step)[:, None]
        w = tl.load(w_here) if EVEN else tl.load(w_here, mask=(start + step < depth)[:, None], other=0)
        if PADDED:
            y, x = top[:, None] + down, left[:, None] + right
            there = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (start + step < depth)[None, :]
            q = tl.load(q_here, mask=there, other=zero.to(tl.int8))
        elif EVEN:
            q = tl.load(q_here)
        else:
            q = tl.load(q_here, mask=(start + step < depth)[None, :], other=0)
        total = tl.dot(q, w, total, out_dtype=tl.int32)
    there = column < columns
    total -= zero * tl.load(sums_at + column, mask=there, other=0)[None, :]
    y = total.to(tl.float32) * (tl.load(scale_at) * tl.load(weight_scale_at + column, mask=there, other=0.0))[None, :]
    if BIASED:
        y += tl.load(bias_at + column, mask=there, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y_at + place, y.to(y_at.dtype.element_ty), mask=(row < rows)[:, None] & there[None, :])
