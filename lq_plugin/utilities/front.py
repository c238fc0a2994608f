"""Points that no other one is better than, by size and quality."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

#: Size and quality.
Point = tuple[float, float]


def pareto_front(points: Sequence[Point], maximize: bool = True) -> list[int]:
    """Returns the indices of the points `(size, quality)` that no other is better than in both, by size.

    >>> pareto_front([(4.0, 0.8), (3.0, 0.9), (2.0, 0.5), (3.5, 0.95)])
    [2, 1, 3]
    """
    sign = 1.0 if maximize else -1.0
    best, front = -inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            best = sign * points[index][1]
            front.append(index)
    return front
