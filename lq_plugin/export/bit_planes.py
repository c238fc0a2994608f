"""Integers of at most 16 bits packed without gaps: one plane of bits after the other.

Plane p holds bit p of every number, eight numbers a byte, the first in the highest bit, padded with zeros at its
end: b · ⌈n / 8⌉ bytes for n numbers of b bits. Numbers of 0 bits are all 0 and take nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed_size(count: int, bits: int) -> int:
    """Returns the bytes that `count` integers take.

    >>> packed_size(9, 3)
    6
    """
    return bits * -(-count // 8)


def pack(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Returns the bytes of integers in 0..2^bits - 1.

    Args:
        codes: integers of any shape, in C order.
        bits: 0..16.

    Raises:
        ValueError: when a number does not fit.

    >>> pack(np.array([1, 2, 3]), 2)
    array([160,  96], dtype=uint8)
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if not 0 <= bits <= 16:
        raise ValueError(f"bits must be 0..16, got {bits}")
    if flat.size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise ValueError(f"numbers of {bits} bits lie in 0..{2**bits - 1}, got {flat.min()}..{flat.max()}")
    narrow: NDArray[np.uint16] = flat.astype(np.uint16)
    planes = [np.packbits(((narrow >> plane) & 1).astype(np.uint8)) for plane in range(bits)]
    return np.concatenate(planes) if planes else np.zeros(0, np.uint8)


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int32]:
    """Returns the first `count` integers of what `pack` made.

    Args:
        packed: bytes of `pack`.
        bits: of each integer, 0..16.
        count: number of integers.

    Raises:
        ValueError: when there are too few or too many bytes.

    >>> unpack(pack(np.array([5, 0, 7]), 3), 3, 3)
    array([5, 0, 7], dtype=int32)
    """
    if packed.size != packed_size(count, bits):
        raise ValueError(f"{count} numbers of {bits} bits take {packed_size(count, bits)} bytes, got {packed.size}")
    codes = np.zeros(count, dtype=np.int32)
    for plane, row in enumerate(packed.reshape(bits, packed_size(count, 1))):
        codes |= np.unpackbits(row, count=count).astype(np.int32) << plane
    return codes
