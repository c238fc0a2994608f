"""Optimal k-means in one dimension, by dynamic programming: clusters are intervals of the sorted numbers.

With cost(i, j) = Σ w·x² - (Σ w·x)² / Σ w over the points i..j-1, from prefix sums in O(1):

    D_1(j) = cost(0, j),      D_k(j) = min_i D_{k-1}(i) + cost(i, j)

The minimising i does not decrease with j, so that each D_k is found by divide and conquer in O(n log n).

A row with more distinct values than `max_points` is summarised first: half of the points are runs of equal counts of
the sorted values, half the cells of equal width, and each point stands for the mean of its values, weighted by their
number. The sum of squares within a point is left out; it is the same for every clustering that keeps points whole.

Reference: Wang, Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming", R Journal
2011; Grønlund et al., "Fast Exact k-Means, k-Medians and Bregman Divergence Clustering in 1D" (arXiv 1701.07204).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lq_plugin.functional.pieces import AT_A_TIME

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def exact_centroids(ordered: Tensor, levels: int, max_points: int = 4096) -> tuple[Tensor, bool]:
    """Returns the centroids with the smallest squared error, row by row.

    Args:
        ordered: `[R, n]`, each row ascending.
        levels: k.
        max_points: rows with more distinct values are summarized into at most that many.

    Returns:
        Float32 `[R, levels]`, ascending (the last repeats where a row has fewer distinct values), and whether no row
        was summarised.

    >>> exact_centroids(torch.tensor([[0.0, 1.0, 8.0, 9.0, 30.0]]), 3)
    (tensor([[ 0.5000,  8.5000, 30.0000]]), True)
    """
    results, optimal = [], True
    for row in ordered.cpu().numpy():
        # No copy of a long row in float64: eight bytes a weight, and as many again to find what is distinct.
        if _distinct(row) > max_points:
            points, counts, optimal = *summary(row, max_points), False
        else:
            points, counts = np.unique(row.astype(np.float64), return_counts=True)
        found = weighted_kmeans(points, counts, min(levels, len(points)))
        results.append(np.pad(found, (0, levels - len(found)), mode="edge"))
    return torch.from_numpy(np.stack(results)).float().to(ordered.device), optimal


def _distinct(ordered: NDArray[np.floating[Any]]) -> int:
    """Returns the number of distinct values of an ascending row, a piece at a time."""
    starts = range(0, len(ordered) - 1, AT_A_TIME)
    pieces = (ordered[start : start + AT_A_TIME + 1] for start in starts)
    return 1 + sum(int(np.count_nonzero(piece[1:] != piece[:-1])) for piece in pieces)


def summary(ordered: NDArray[np.floating[Any]], max_points: int) -> tuple[Floats, Ints]:
    """Returns at most `max_points` means of neighbours, ascending, and the number of values each stands for.

    >>> summary(np.array([0.0, 1.0, 2.0, 3.0, 100.0]), 4)
    (array([  0.5,   2.5, 100. ]), array([2, 2, 1]))
    """
    half, n = max_points // 2, len(ordered)
    even_counts = np.arange(half) * n // half
    even_width = _first_from(ordered, np.linspace(ordered[0], ordered[-1], half, endpoint=False, dtype=np.float64))
    starts = np.union1d(even_counts, even_width)
    ends = np.append(starts[1:], n)
    sums = np.empty(len(starts))
    step = max(half // 64, 1)
    for first in range(0, len(starts), step):
        some = slice(first, first + step)
        begin = starts[first]
        sums[some] = np.add.reduceat(ordered[begin : ends[some][-1]].astype(np.float64), starts[some] - begin)
    return sums / (ends - starts), ends - starts


def _first_from(ordered: NDArray[np.floating[Any]], bounds: Floats) -> Ints:
    """Returns the index of the first value not below each bound.

    Bounds have the dtype of the values, or numpy would convert all values.
    """
    rounded = bounds.astype(ordered.dtype)
    above = np.nextafter(rounded, np.array(np.inf, ordered.dtype))
    return np.searchsorted(ordered, np.where(rounded < bounds, above, rounded))


def weighted_kmeans(points: Floats, counts: Ints, levels: int) -> Floats:
    """Returns the optimal centroids of weighted points.

    Args:
        points: ascending, distinct.
        counts: how often each occurs.
        levels: at most as many as there are points.

    >>> weighted_kmeans(np.array([0.0, 1.0, 5.0]), np.array([3, 1, 1]), 2)
    array([0.25, 5.  ])
    """
    n = len(points)
    shift = np.average(points, weights=counts)  # centred, prefix sums lose the least
    centred = points - shift
    weight, first, second = (np.concatenate([[0.0], np.cumsum(counts * centred**power)]) for power in range(3))

    def cost(i: Ints, j: Ints) -> Floats:
        mass = weight[j] - weight[i]
        spread: Floats = second[j] - second[i] - (first[j] - first[i]) ** 2 / np.maximum(mass, 1)
        return spread

    ends = np.arange(n + 1)
    best = cost(np.zeros_like(ends), ends)
    cuts = []
    # One row a level is kept: in int64, 256 levels over 4,096 points would take 8 MiB.
    narrow = np.min_scalar_type(n)
    for k in range(2, levels + 1):
        best, cut = _next_row(best, k, n, cost)
        cuts.append(cut.astype(narrow))
    bounds = [n]
    for cut in reversed(cuts):
        bounds.append(int(cut[bounds[-1]]))
    edges = np.array([*bounds, 0][::-1])
    low, high = edges[:-1], edges[1:]
    means = (first[high] - first[low]) / (weight[high] - weight[low]) + shift
    # The difference of two long sums may miss its members by a rounding, and with it the order.
    centroids: Floats = np.clip(means, points[low], points[high - 1])
    return centroids


def _next_row(previous: Floats, k: int, n: int, cost: Any) -> tuple[Floats, Ints]:
    """Returns D_k from D_{k-1}, and the minimizing i of each j; D_k(j) is infinite for j < k.

    Divide and conquer, one depth at a time: each j searches only between the i of its known neighbours.
    """
    best = np.full(n + 1, np.inf)
    cut = np.zeros(n + 1, dtype=np.int64)
    step = 1 << n.bit_length()
    known_low, known_high = k - 1, n - 1
    while step > 1:
        step //= 2
        j = np.arange(step, n + 1, 2 * step)
        j = j[j >= k]
        if not len(j):
            continue
        below, above = j - step, j + step
        low = np.where(below >= k, cut[np.maximum(below, 0)], known_low)
        high = np.minimum(np.where(above <= n, cut[np.minimum(above, n)], known_high), j - 1)
        lengths = high - low + 1
        starts = np.cumsum(lengths) - lengths
        i = np.arange(lengths.sum()) - np.repeat(starts - low, lengths)
        total = previous[i] + cost(i, np.repeat(j, lengths))
        best[j] = np.minimum.reduceat(total, starts)
        where = np.flatnonzero(total == np.repeat(best[j], lengths))
        # The first of several minima.
        cut[j] = i[where[np.searchsorted(where, starts)]]
    return best, cut
