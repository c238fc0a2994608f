"""Ternary numbers, five of them in a byte, in the layout of ggml's TQ1_0.

Five digits 0, 1, 2 are a number 0..242 of base 3. The byte is that number times 256 / 243, rounded up: then
`(byte · 3^n mod 256) · 3 // 256` is its n-th digit, without a division. A block of 256 numbers takes 52 bytes. Byte j
of the first 32 has the digits j, j + 32, ..., j + 128; those of the next 16 lie 16 apart, and the last 4 bytes hold
four digits each, 4 apart.

Source: `block_tq1_0` and `dequantize_row_tq1_0` of ggml.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers of a block, which takes 52 bytes.
BLOCK = 256
#: Parts of a block: bytes, and digits of each.
_PARTS = ((32, 5), (16, 5), (4, 4))
_POWERS = (1, 3, 9, 27, 81)


def pack_trits(digits: Tensor) -> Tensor:
    """Returns the bytes of ternary numbers, int32 `[..., 52]`.

    Args:
        digits: 0, 1 or 2, int32 `[..., 256]`.

    >>> pack_trits(torch.ones(256, dtype=torch.int32)).unique()  # 121 · 256 / 243, and 120 where there are four
    tensor([127, 128], dtype=torch.int32)
    """
    found, start = [], 0
    for size, count in _PARTS:
        part = digits[..., start : start + size * count].unflatten(-1, (count, size))
        powers = torch.tensor(_POWERS[::-1][:count], dtype=torch.int32, device=digits.device)
        number = (part * powers.unsqueeze(1)).sum(-2, dtype=torch.int32)
        found.append((number * 256 + 242).div(243, rounding_mode="floor"))
        start += size * count
    return torch.cat(found, -1)


def unpack_trits(packed: Tensor) -> Tensor:
    """Returns the numbers 0, 1 or 2 of bytes, int32 `[..., 256]`.

    Args:
        packed: 0..255, int32 `[..., 52]`.

    >>> digits = torch.arange(256, dtype=torch.int32) % 3
    >>> torch.equal(unpack_trits(pack_trits(digits)), digits)
    True
    """
    found, start = [], 0
    for size, count in _PARTS:
        part = packed[..., start : start + size].unsqueeze(-2)
        powers = torch.tensor(_POWERS[:count], dtype=torch.int32, device=packed.device)
        found.append((part * powers.unsqueeze(1) % 256 * 3 // 256).flatten(-2))
        start += size
    return torch.cat(found, -1)
