"""Expected hypervolume improvement of plans whose costs are known and whose metric is normal.

A front leaves, at each cost c, the best metric t(c) of all its plans that cost no more; t is a step function. A plan of
cost c₀ that scores m adds the volume ∫_{c ≥ c₀} max(m - t(c), 0) dc, up to the reference point. With m ~ N(μ, σ²) its
expectation is exact: the sum over the steps of width times expected improvement over the step's height,

    EI(t) = (μ - t) Φ(z) + σ φ(z),   z = (μ - t) / σ

(Jones et al., "Efficient Global Optimization of Expensive Black-Box Functions", 1998, equation 15; the sum over cells
is that of Emmerich et al., "Hypervolume-based expected improvement", 2011, where only one objective is uncertain). With
several costs, the steps are the cells of the grid that the front's costs make.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
from scipy.special import ndtr

from lq_plugin.search.surrogate.regression import Floats

#: Cells of a grid at most: with several costs, a long front is thinned to it.
_CELLS = 4096


class Front:
    """Front of finished plans; a larger metric and smaller costs are better.

    Args:
        metric: of each plan, `[plans]`.
        costs: `[plans, costs]`.
        worst: metric of the reference point; what scores less is worth nothing.
        most: costs of the reference point, `[costs]`; at least as large as any that counts.
    """

    def __init__(self, metric: Floats, costs: Floats, worst: float, most: Floats) -> None:
        self.worst = worst
        number = costs.shape[1]
        thin = len(metric) if number < 2 else max(int(_CELLS ** (1 / number)) - 1, 1)
        self._edges, self._ends = [], []
        for dim in range(number):
            values = np.unique(costs[:, dim])
            if len(values) > thin:
                values = values[np.linspace(0, len(values) - 1, thin).round().astype(int)]
            # Below the cheapest plan nothing is reached.
            self._edges.append(np.concatenate([[-np.inf], values]))
            self._ends.append(np.concatenate([values, most[dim : dim + 1]]))
        shape = tuple(len(edges) for edges in self._edges)
        self.heights = np.full(shape, worst)
        for score, cost in zip(metric, costs, strict=True):
            first = tuple(slice(int(np.searchsorted(e, c)), None) for e, c in zip(self._edges, cost, strict=True))
            self.heights[first] = np.maximum(self.heights[first], score)

    def height(self, costs: Floats) -> Floats:
        """Returns the best metric of the plans that cost no more than each of `costs`, `[plans]`."""
        cell = tuple(np.searchsorted(e, costs[:, dim], side="right") - 1 for dim, e in enumerate(self._edges))
        found: Floats = self.heights[cell] if cell else np.full(len(costs), float(self.heights))
        return found

    def improvement(self, mean: Floats, deviation: Floats, costs: Floats) -> Floats:
        """Returns the volume that each plan is expected to add.

        Args:
            mean, deviation: of the metric, `[plans]`.
            costs: `[plans, costs]`.
        """
        heights, where = np.unique(self.heights, return_inverse=True)
        expected = expected_improvement(mean[:, None], deviation[:, None], heights[None])
        widths = [
            np.maximum(ends[None] - np.maximum(edges[None], costs[:, dim, None]), 0.0)
            for dim, (edges, ends) in enumerate(zip(self._edges, self._ends, strict=True))
        ]
        volumes = reduce(lambda a, b: (a[:, :, None] * b[:, None]).reshape(len(a), -1), widths, np.ones((len(mean), 1)))
        by_height = volumes @ (where.ravel()[:, None] == np.arange(len(heights)))
        found: Floats = (by_height * expected).sum(1)
        return found

    def probability(self, mean: Floats, deviation: Floats, costs: Floats) -> Floats:
        """Returns the probability that each plan scores more than all that cost no more.

        Args:
            mean, deviation: of the surrogate's prediction, `[plans]`.
            costs: `[plans, costs]`.
        """
        found: Floats = ndtr((mean - self.height(costs)) / deviation)
        return found


def expected_improvement(mean: Floats, deviation: Floats, height: Floats) -> Floats:
    """Returns E[max(m - height, 0)] of normal m.

    Args:
        mean, deviation: of m.
        height: what is to be exceeded.

    >>> import numpy as np
    >>> round(float(expected_improvement(np.array(0.0), np.array(1.0), np.array(0.0))), 4)  # 1 / √(2π)
    0.3989
    """
    z = (mean - height) / deviation
    found: Floats = (mean - height) * ndtr(z) + deviation * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.maximum(found, 0.0)
