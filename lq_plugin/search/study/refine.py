"""Proposals that fill the gaps of a front: plans a step or a swap away from those at its two sides.

Between two neighbours of the front, `(c_1, m_1)` and `(c_2, m_2)`, lies a box of `(c_2 - c_1) · (m_2 - m_1)` that a
plan in between would cut into. What such a plan scores is predicted from the neighbour it comes from, by the additive
model of `lq_plugin.search.study.seeds`: m = m_1 + k · (H_1 - H), H the summed sensitivity and k the slope between the
two. The gap is drawn by its area, the plan by the area it is expected to win, (m - m_1) · (c_2 - c). What was measured
corrects the model: a step that failed is in no front.

A local search of the front with a model that sorts its candidates, as in pre-selection of surrogate-assisted evolution
(Jin, "Surrogate-assisted evolutionary computation", 2011, section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lq_plugin.search.space.model_space import ModelSpace, Params, params_of
from lq_plugin.search.study.seeds import Table
from lq_plugin.utilities.front import pareto_front

#: Swaps (one tensor gets less, another one more) that are looked at, of each neighbour.
SWAPS = 2048
#: Probability of taking the best candidate; else the next one is taken with the same probability, and so on.
GREED = 0.5
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


class Point(NamedTuple):
    """A finished trial of two objectives; a larger `metric` is better."""

    metric: float
    cost: float
    params: Mapping[str, object]


class Refiner:
    """Proposes plans between adjacent points of a front.

    Args:
        space: what may be chosen.
        sensitivity: harm of each choice of each unit.
        base, costs: see `lq_plugin.search.study.seeds.unit_costs`.
        most: no plan may cost more.
        seed: of the draws.
    """

    def __init__(
        self, space: ModelSpace, sensitivity: Table, base: float, costs: Table, most: float = np.inf, seed: int = 0
    ) -> None:
        self.units = [unit for unit in space.units if len(unit.choices) > 1]
        self.harms = [self._values(sensitivity, unit.name, unit.choices) for unit in self.units]
        self.prices = [self._values(costs, unit.name, unit.choices) for unit in self.units]
        self.base, self.most = base, most
        self.rng = np.random.default_rng(seed)

    @staticmethod
    def _values(table: Table, name: str, choices: Iterable[object]) -> _Floats:
        row = table.get(name, {})
        return np.array([row.get(str(choice), 0.0) for choice in choices])

    def propose(self, points: Sequence[Point], taken: Collection[frozenset[tuple[str, object]]]) -> Params | None:
        """Returns a plan that is not `taken`; None where the front has no gap that one fits in.

        Args:
            points: finished trials.
            taken: of all trials.
        """
        gaps = [(low, high) for low, high in pairwise(front_of(points)) if low.cost < self.most]
        areas = np.array([(high.cost - low.cost) * (high.metric - low.metric) for low, high in gaps])
        while len(gaps) and areas.sum() > 0:
            index = int(self.rng.choice(len(gaps), p=areas / areas.sum()))
            if (params := self._between(*gaps[index], taken)) is not None:
                return params
            areas[index] = 0.0
        return None

    def _between(self, low: Point, high: Point, taken: Collection[frozenset[tuple[str, object]]]) -> Params | None:
        starts = [self._indices(point) for point in (low, high)]
        harms = [self._sum(self.harms, start) for start in starts]
        gained, spared = high.metric - low.metric, float(harms[0] - harms[1])
        if spared <= 0:
            # The model orders the two wrongly: only its order of the candidates is used.
            spared = max(float(np.ptp(row)) for row in self.harms) or 1.0
        plans, metrics = [], []
        for start, harm, point in zip(starts, harms, (low, high), strict=True):
            found = self._neighbours(start)
            plans.append(found)
            metrics.append(point.metric + gained / spared * (harm - self._sum(self.harms, found)))
        candidates, metric = np.concatenate(plans), np.concatenate(metrics)
        cost = self.base + self._sum(self.prices, candidates)
        inside = (cost >= low.cost) & (cost < high.cost) & (cost <= self.most)
        # What promises more than the far side would be there already; what promises less than the near one is not
        # tried.
        worth = np.minimum(metric, high.metric) - low.metric
        inside &= worth > 0
        candidates, gain = candidates[inside], (worth * (high.cost - cost))[inside]
        while len(candidates):
            order = np.argsort(-gain, kind="stable")
            rank = min(int(self.rng.geometric(GREED)) - 1, len(order) - 1)
            index = order[rank]
            params = self._params(candidates[index])
            if frozenset(params.items()) not in taken:
                return params
            candidates, gain = np.delete(candidates, index, 0), np.delete(gain, index)
        return None

    def _indices(self, point: Point) -> _Ints:
        return np.array([unit.choices.index(unit.choice(point.params)) for unit in self.units])

    def _sum(self, tables: Sequence[_Floats], plans: _Ints) -> _Floats:
        total = np.zeros(plans.shape[:-1])
        for unit, table in enumerate(tables):
            total = total + table[plans[..., unit]]
        return total

    def _params(self, plan: _Ints) -> Params:
        places = dict(zip((unit.name for unit in self.units), plan, strict=True))
        return params_of(self.units, lambda unit: unit.choices[places[unit.name]])

    def _neighbours(self, start: _Ints) -> _Ints:
        """Returns all plans that are a step away, and some that are a swap of two units away."""
        steps = [
            (unit, choice) for unit, row in enumerate(self.harms) for choice in range(len(row)) if choice != start[unit]
        ]
        places = np.array(steps, dtype=np.int64)
        singles = np.repeat(start[None], len(places), 0)
        singles[np.arange(len(places)), places[:, 0]] = places[:, 1]
        pairs = places[self.rng.integers(len(places), size=(SWAPS, 2))]
        pairs = pairs[pairs[:, 0, 0] != pairs[:, 1, 0]]
        doubles = np.repeat(start[None], len(pairs), 0)
        for side in (0, 1):
            doubles[np.arange(len(pairs)), pairs[:, side, 0]] = pairs[:, side, 1]
        return np.concatenate([singles, doubles])


def front_of(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other is better than in both objectives, from the cheapest to the best.

    >>> points = [Point(0.9, 4.0, {}), Point(0.5, 2.0, {}), Point(0.4, 3.0, {}), Point(0.9, 5.0, {})]
    >>> [point.cost for point in front_of(points)]
    [2.0, 4.0]
    """
    return [points[index] for index in pareto_front([(point.cost, point.metric) for point in points])]
