"""An estimate of the energy of a pass, from what operations took on one silicon process.

    a product of floats               multiplied 3.7 pJ, added 0.9 pJ
    a product of integers of b, c bit multiplied 0.2 pJ · b · c / 64, added to a sum of 32 bit 0.1 pJ
    a weight                          read from DRAM once for each input sample, 1.95 nJ for 64 bit; so is every other
                                      parameter, and an embedding's table as a whole

These are the figures for 45 nm and 0.9 V of Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC
2014, figure 1.1.9: multiplications of 8-bit and 32-bit integers 0.2 and 3.1 pJ, so they grow with the product of the
widths (which gives 3.2); DRAM 1.3 to 2.6 nJ for 64 bit, here the mean. A format that is no integer counts by its
bit-width. Activations are taken to stay on the chip, so nothing is counted for them, nor for instructions. The figure
orders plans of one model; a processor of today takes less for each of these, and has others.
"""

from __future__ import annotations

#: Bits that stand for float.
FLOAT_BITS = 32
#: Picojoules.
FLOAT_MULTIPLY, FLOAT_ADD = 3.7, 0.9
INTEGER_MULTIPLY, INTEGER_ADD = 0.2, 0.1
#: Bits of both factors of that multiplication together, as a product.
_WIDTHS = 8 * 8
#: Picojoules of a bit.
DRAM_BIT = 1950.0 / 64
_TO_MICROJOULES = 1e-6


def mac_energy(left: int, right: int) -> float:
    """Returns the microjoules of one multiply-accumulate.

    Args:
        left, right: bits of the factors; 32 is float.

    >>> round(mac_energy(8, 8) * 1e6, 4), round(mac_energy(4, 8) * 1e6, 4), round(mac_energy(8, 32) * 1e6, 4)
    (0.3, 0.2, 4.6)
    """
    if FLOAT_BITS in (left, right):
        return (FLOAT_MULTIPLY + FLOAT_ADD) * _TO_MICROJOULES
    return (INTEGER_MULTIPLY * left * right / _WIDTHS + INTEGER_ADD) * _TO_MICROJOULES


def read_energy(bits: int) -> float:
    """Returns the microjoules of reading so many bits from DRAM.

    >>> round(read_energy(64 * 1000), 4)
    1.95
    """
    return bits * DRAM_BIT * _TO_MICROJOULES
