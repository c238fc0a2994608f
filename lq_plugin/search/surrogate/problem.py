"""Knowledge of the sampler about a search before any trial: choices, sensitivities, costs and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lq_plugin.errors import QuantizationError
from lq_plugin.search.sensitivity.pairs import Pair
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.search.space.model_space import ModelSpace, Params, Unit
from lq_plugin.search.surrogate.candidates import Price, everything
from lq_plugin.search.surrogate.regression import Cross, Features, Floats, Ints

#: Harm or cost by unit and choice (as text).
Table = Mapping[str, Mapping[str, float]]
#: Candidates that are priced one by one where costs do not add up.
PRICED = 64


class Problem:
    """Knowledge of a `SurrogateSampler` before any trial.

    Args:
        space: of the study.
        sensitivity: harm of each choice of each unit; where a unit is missing, 4^-bits stands for it.
        costs: for each objective after the metric, the cost of the plan of first choices and what each choice adds, see
            `lq_plugin.search.study.seeds.unit_costs`.
        limits: the same for each cost that is limited, with the constraint.
        exact: from a plan's parameters to its costs, for those that do not add up over units (bit operations multiply
            the bits of weight and input); the best candidates are priced by it.
        exact_limits: the same for the costs of `limits`; without it they are taken to add up.
        pairs: of choices that were measured together.
    """

    def __init__(
        self,
        space: ModelSpace,
        sensitivity: Table,
        costs: Sequence[tuple[float, Table]],
        limits: Sequence[tuple[Constraint, float, Table]] = (),
        exact: Callable[[Params], Sequence[float]] | None = None,
        exact_limits: Callable[[Params], Sequence[float]] | None = None,
        pairs: Sequence[Pair] = (),
    ) -> None:
        self.space, self.exact, self._exact_limits = space, exact, exact_limits
        #: Gives what trials score on average that were scored again, by number.
        self.means: Callable[[], Mapping[int, float]] = dict
        self.units = [unit for unit in space.units if len(unit.choices) > 1]
        self.sizes = [len(unit.choices) for unit in self.units]
        self.features = Features([_harms(unit, sensitivity) for unit in self.units], self._crosses(pairs))
        self.costs = [Price(*self._priced(base, table)) for base, table in costs]
        limited = []
        #: Constraints that are known before a plan is evaluated.
        self.known = {str(constraint) for constraint, *_ in limits}
        for constraint, base, table in limits:
            most, least = (constraint.limit, -np.inf) if constraint.relation == "<=" else (np.inf, constraint.limit)
            limited.append(Price(*self._priced(base, table), most, least))
        # The same trials are read before each proposal.
        self._indices: dict[frozenset[tuple[str, Any]], tuple[int, ...]] = {}
        self._kept: dict[tuple[int, ...], bool] = {}
        summed = self._add_up(limited)
        #: Limits on costs that add up, and by their place in `limits` those on costs that do not.
        self.limits = [limit for limit, adds in zip(limited, summed, strict=True) if adds]
        self.inexact = {i: limit for i, (limit, adds) in enumerate(zip(limited, summed, strict=True)) if not adds}
        #: The costs of the reference point.
        self.most = self._most()
        self.everything = everything(self.sizes)
        if self.everything is not None:
            self.everything = self.everything[self.allowed(self.everything)]

    def _crosses(self, pairs: Sequence[Pair]) -> list[Cross]:
        places = {
            (unit.name, str(choice)): (i, j)
            for i, unit in enumerate(self.units)
            for j, choice in enumerate(unit.choices)
        }
        return [(*places[p.unit, p.choice], *places[p.other, p.other_choice], p.cross) for p in pairs]

    def _priced(self, base: float, table: Table) -> tuple[float, list[Floats]]:
        rows = [np.array([table[unit.name][str(choice)] for choice in unit.choices]) for unit in self.units]
        # Units with one choice add what it costs.
        fixed = sum(sum(table.get(u.name, {}).values()) for u in self.space.units if len(u.choices) == 1)
        return base + fixed, rows

    def _add_up(self, limits: Sequence[Price]) -> list[bool]:
        """Returns for each limit whether its tables give what plans cost, by some plans drawn at random."""
        if self._exact_limits is None or not limits:
            return [True] * len(limits)
        drawn = np.random.default_rng(0).integers(0, self.sizes, size=(PRICED, len(self.sizes)))
        true = np.array([self._exact_limits(self.params(plan)) for plan in drawn], dtype=np.float64)
        return [np.allclose(limit.of(drawn), true[:, i], rtol=1e-6) for i, limit in enumerate(limits)]

    def _most(self) -> Floats:
        """Returns what plans cost at most, `[costs]`."""
        found = []
        for i, price in enumerate(self.costs):
            high = price.base + sum(float(table.max()) for table in price.tables)
            if self.exact is not None:
                # The changes from a plan of few bits are small, those of all units together are not.
                largest = np.array([[int(table.argmax()) for table in price.tables]], dtype=np.int64)
                high = max(high, float(self.exact_prices(largest)[0, i]))
            found.append(high)
        return np.array(found, dtype=np.float64)

    def first_kept(self, plans: Ints) -> Ints:
        """Returns plans that keep all limits, of the first `PRICED` ones of which any does: none if none does.

        Args:
            plans: `allowed` ones, the best first.
        """
        if not self.inexact:
            return plans
        for start in range(0, len(plans), PRICED):
            some = plans[start : start + PRICED]
            kept: Ints = some[np.array([self._keeps(plan) for plan in some], dtype=bool)]
            if len(kept):
                return kept
        return plans[:0]

    def _keeps(self, plan: Ints) -> bool:
        """Returns whether a plan keeps the limits on costs that do not add up."""
        key = tuple(plan.tolist())
        if key not in self._kept:
            assert self._exact_limits is not None
            costs = self._exact_limits(self.params(plan))
            self._kept[key] = all(limit.holds(np.array([costs[i]]))[0] for i, limit in self.inexact.items())
        return self._kept[key]

    def allowed(self, plans: Ints) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Returns which plans keep the limits of their costs that add up."""
        found = np.ones(len(plans), dtype=bool)
        for limit in self.limits:
            found &= limit.keeps(plans)
        return found

    def prices(self, plans: Ints) -> Floats:
        """Returns the costs of plans, `[plans, costs]`, as sums over units."""
        rows = [price.of(plans) for price in self.costs]
        # A sum that is none in truth may end below 0.
        floors = [
            1e-3 * max(price.base, float(row.max(initial=0.0))) for price, row in zip(self.costs, rows, strict=True)
        ]
        return np.column_stack(
            [np.maximum(r, f) for r, f in zip(rows, floors, strict=True)] or [np.empty((len(plans), 0))]
        )

    def exact_prices(self, plans: Ints) -> Floats:
        """Returns the costs of plans, priced one by one."""
        assert self.exact is not None
        return np.array([self.exact(self.params(plan)) for plan in plans], dtype=np.float64).reshape(len(plans), -1)

    def indices(self, params: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns a plan as the index of each unit's choice."""
        key = frozenset((name, params[name]) for name in self.space.distributions)
        if key not in self._indices:
            self._indices[key] = tuple(unit.choices.index(unit.choice(params)) for unit in self.units)
        return self._indices[key]

    def params(self, plan: Sequence[int] | Ints) -> Params:
        """Returns the values of the parameters for a plan: the inverse of `indices`."""
        found: Params = {}
        for unit, index in zip(self.units, plan, strict=True):
            found |= unit.params(unit.choices[int(index)])
        return found


def _harms(unit: Unit, sensitivity: Table) -> Floats:
    row = sensitivity.get(unit.name, {})
    odd = [choice for choice in map(str, unit.choices) if not math.isfinite(row.get(choice, 0.0))]
    if odd:
        raise QuantizationError(
            f"sensitivities are finite numbers: that of {unit.name}, {odd[0]} is {row[odd[0]]}"
            + f" ({len(odd)} such choices)" * (len(odd) > 1)
        )
    return np.array([row.get(str(c), 0.0 if isinstance(c, str) else 4.0**-c.bit_width) for c in unit.choices])
