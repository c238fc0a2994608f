"""The interval of the numbers that are within the bounds of a clip once they are rounded.

A comparison with its ends is cheaper than the rounding itself.
"""

from __future__ import annotations

import numpy as np


def pass_band(scale: float, low: float, high: float) -> tuple[float, float]:
    """Returns the float32 numbers a and b with round(x / scale) in `low..high` exactly for a < x < b.

    Args:
        scale: positive.
        low, high: integers.

    >>> pass_band(1.0, -2, 2)  # 2.5 rounds to the even 2, so it is inside
    (-2.500000238418579, 2.500000238418579)
    """
    inverse = np.float32(1.0) / np.float32(scale)
    return _first_beyond(inverse, low, np.float32(-np.inf)), _first_beyond(inverse, high, np.float32(np.inf))


def _first_beyond(inverse: np.float32, level: float, direction: np.float32) -> float:
    sign = np.sign(direction)
    with np.errstate(over="ignore"):
        x = np.float32((level + 0.5 * sign) / np.float64(inverse))
        while sign * (np.rint(x * inverse) - level) > 0:
            x = np.nextafter(x, -direction)
        while sign * (np.rint(x * inverse) - level) <= 0 and np.isfinite(x):
            x = np.nextafter(x, direction)
    return float(x)
