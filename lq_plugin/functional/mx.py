"""MX4, MX6, MX9: a shared exponent for 16 elements and a one-bit microexponent for each pair of them.

For a block of k1 = 16 elements along the reduction dim, its pairs (k2 = 2), and m mantissa bits (sign apart):

    E = floor(log2 max|x_block|),   τ = min(1, E - floor(log2 max|x_pair|))   (1 for a pair of zeros)
    Δ = 2^(E - τ - (m - 1)),        x̂ = Δ · clip(round(x / Δ), -(2^m - 1), 2^m - 1)

| format | m | bits an element: m + 1 + 8 / 16 + 1 / 2 |
|---|---|---|
| MX9 | 7 | 9 |
| MX6 | 4 | 6 |
| MX4 | 2 | 4 |

There is no implicit leading one, and the levels are sign and magnitude. Values in the last half step below 2^(E+1)
saturate. Steps below 2^-126, the smallest normal float32, are that. Backward: straight through inside the levels.

Reference: Darvish Rouhani et al., "With Shared Microexponents, A Little Shifting Goes a Long Way", ISCA 2023
(arXiv 2302.08007), section 3 and table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements that share an exponent, and that share a microexponent.
BLOCK, PAIR = 16, 2
#: Bits of a pair's exponent; a block's has 8.
MICRO_BITS = 1


def mx_step(x: Tensor, mantissa_bits: int, micro_bits: int = MICRO_BITS) -> Tensor:
    """Returns Δ of every element, float32.

    Args:
        x: `[O, G, 16, *k]`, one block along dim 2, padded with zeros where it is ragged.
        mantissa_bits: m.
        micro_bits: bits of a pair's exponent; 0 leaves it out, which makes the block floating point of the same m.

    Returns:
        Float32, the shape of `x`; powers of two.

    >>> mx_step(torch.tensor([1.5, 0.5, 0.25, 0.1] + 12 * [0.0]).reshape(1, 1, 16), 2)[0, 0, :4]
    tensor([0.5000, 0.5000, 0.2500, 0.2500])
    """
    return step_of(*mx_exponents(x, micro_bits), mantissa_bits)


def mx_exponents(x: Tensor, micro_bits: int = MICRO_BITS) -> tuple[Tensor, Tensor]:
    """Returns E of every block, `[O, G, 1, *k]`, and τ of every pair, `[O, G, 8, *k]`; int32."""
    magnitude = x.float().abs()
    # Of two strided halves, which torch compares faster than it reduces pairs.
    pairs = torch.maximum(magnitude[:, :, 0::PAIR], magnitude[:, :, 1::PAIR])
    exponent = _floor_log2(pairs.amax(2, keepdim=True)).clamp_(max=127)
    # A pair of zeros has no exponent of its own and takes the finest step.
    shift = (exponent - _floor_log2(pairs)).clamp_(max=2**micro_bits - 1).masked_fill_(pairs == 0, 2**micro_bits - 1)
    return exponent, shift


def step_of(exponent: Tensor, shift: Tensor, mantissa_bits: int) -> Tensor:
    """Returns Δ of every element, from E and τ.

    Args:
        exponent: E, int32 `[O, G, 1, *k]`.
        shift: τ, int32 `[O, G, 8, *k]`.
        mantissa_bits: m.
    """
    step = (exponent - shift - (mantissa_bits - 1)).clamp_(min=-126)
    # 2^step, a normal float32, from its bits.
    power = (step.to(torch.int32) + 127 << 23).view(torch.float32)
    return power.unsqueeze(3).expand(*power.shape[:3], PAIR, *power.shape[3:]).flatten(2, 3)


def _floor_log2(x: Tensor) -> Tensor:
    """Returns floor(log2 x) of x ≥ 0 from its bits, int32; -127 below 2^-126, 128 for infinity and NaN."""
    # Without the sign: that of a NaN may be set.
    return (x.contiguous().view(torch.int32) >> 23 & 0xFF) - 127
