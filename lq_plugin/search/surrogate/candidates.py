"""Plans worth predicting: all of a small space; of a large one the neighbours of its front, and integer programs.

A plan is an array with the index of each unit's choice. The integer program takes the surrogate for additive around a
plan of the front: the loss of a choice is what the surrogate predicts for that change alone, which has the pairs with
all other choices of the plan in it. What it gives changes many units at once, where neighbours change one or two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from lq_plugin.search.surrogate.knapsack import walk
from lq_plugin.search.surrogate.regression import Floats, Ints

NDBool = NDArray[np.bool_]

#: Spaces of so many plans are predicted whole.
ENUMERATED = 8192
#: Changes of one unit of each plan that are looked at, at most.
STEPS = 1024
#: Swaps (one unit gets less, another one more) of each plan of the front that is looked at.
_SWAPS = 256
#: Plans of the front whose neighbours are looked at.
_AROUND = 3
#: How much more than the least harm, as a share of it, counts as the least.
_GAP = 1e-3
#: Nodes after which an integer program's best plan so far is taken. A limit of time would make a seed irreproducible.
_NODES = 100


@dataclass(frozen=True)
class Price:
    """A cost that adds up over units.

    Args:
        base: of a plan before its choices are counted.
        tables: what each choice of each unit adds.
        most, least: limits that a constraint sets it.
    """

    base: float
    tables: Sequence[Floats] = field(repr=False)
    most: float = np.inf
    least: float = -np.inf

    def of(self, plans: Ints) -> Floats:
        """Returns the cost of each plan."""
        total = np.full(len(plans), self.base)
        for unit, table in enumerate(self.tables):
            total = total + table[plans[:, unit]]
        return total

    def keeps(self, plans: Ints) -> NDBool:
        """Returns which plans keep the limits."""
        return self.holds(self.of(plans))

    def holds(self, cost: Floats) -> NDBool:
        """Returns which costs are within the limits."""
        slack = 1e-9 * np.maximum(np.abs(cost), 1e-300)
        found: NDBool = (cost <= self.most + slack) & (cost >= self.least - slack)
        return found


def everything(sizes: Sequence[int]) -> Ints | None:
    """Returns all plans of a space with so many choices for each unit; None where there are more than `ENUMERATED`.

    >>> everything([2, 2]).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    if np.prod(np.array(sizes, dtype=np.float64)) > ENUMERATED:
        return None
    return np.array(list(itertools.product(*(range(size) for size in sizes))), dtype=np.int64)


def steps(plan: Ints, sizes: Sequence[int]) -> Ints:
    """Returns all plans that differ from one in one unit, `[plans, units]`."""
    places = [(unit, choice) for unit, size in enumerate(sizes) for choice in range(size) if choice != plan[unit]]
    units, choices = np.array(places, dtype=np.int64).reshape(-1, 2).T
    found = np.repeat(plan[None], len(places), 0)
    found[np.arange(len(places)), units] = choices
    return found


def swaps(plan: Ints, sizes: Sequence[int], rng: np.random.Generator, count: int = _SWAPS) -> Ints:
    """Returns plans that differ from one in two or three units, drawn at random.

    Args:
        plan: to start from.
        sizes: number of choices of each unit.
        rng: of the draws.
        count: how many.
    """
    found = np.repeat(plan[None], count, 0)
    rows = np.arange(count)
    for change in range(3):
        units = rng.integers(len(sizes), size=count)
        choices = (rng.random(count) * np.array(sizes)[units]).astype(np.int64)
        moved = rows if change < 2 else rows[rng.random(count) < 0.5]
        found[moved, units[moved]] = choices[moved]
    return found


def near(plan: Ints, sizes: Sequence[int], rng: np.random.Generator) -> Ints:
    """Returns neighbours of a plan: those that differ in one unit, at most `STEPS` of them, and some in two or three.

    Args:
        plan: to start from.
        sizes: number of choices of each unit.
        rng: of the draws.
    """
    single = steps(plan, sizes)
    if len(single) > STEPS:
        single = single[rng.choice(len(single), STEPS, replace=False)]
    return np.concatenate([single, swaps(plan, sizes, rng)])


def around(front: Ints, sizes: Sequence[int], rng: np.random.Generator) -> Ints:
    """Returns neighbours of some plans of a front, the front's ends and gaps drawn at random.

    Args:
        front: plans, `[plans, units]`.
        sizes: number of choices of each unit.
        rng: of the draws.
    """
    chosen = rng.choice(len(front), min(_AROUND, len(front)), replace=False)
    return np.concatenate([near(front[i], sizes, rng) for i in chosen])


def cheapest_harm(
    harms: Sequence[Floats], price: Price, budget: float, others: Sequence[Price] = (), gap: float = _GAP
) -> Ints | None:
    """Returns the plan of least summed harm that costs at most `budget`; None where none is found.

    min Σ h(u, c) x(u, c) with one choice c for each unit u: the multiple-choice knapsack problem, by its relaxation
    where that is close enough and there is one cost, else by HiGHS.

    Args:
        harms: of each choice of each unit.
        price: what the budget is of.
        budget: of the whole plan.
        others: further costs, whose limits are kept.
        gap: share of the least harm, counted from that without a budget, that the plan may have more before HiGHS is
            asked.
    """
    most, walked = min(budget, price.most), None
    if price.least == -np.inf and all(_implied(other, price, most) for other in others):
        walked = walk(harms, price.tables, most - price.base + 1e-9 * max(abs(most), abs(price.base)))
        if walked is None:
            return None
        plan, excess = walked
        above = sum(float(row[choice] - row.min()) for row, choice in zip(harms, plan, strict=True)) - excess
        if not excess or excess <= gap * max(above, 1e-3 * sum(float(np.ptp(row)) for row in harms)):
            return plan
    sizes = [len(row) for row in harms]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    limits = [LinearConstraint((owner[None] == np.arange(len(sizes))[:, None]).astype(float), 1.0, 1.0)]
    # Scaled, since the solver's tolerances are absolute.
    for cost, bound in [(price, most), *((other, other.most) for other in others)]:
        flat = np.concatenate(list(cost.tables))
        scale = float(np.abs(flat).max()) or 1.0
        bounds = (cost.least - cost.base) / scale, (bound - cost.base) / scale + 1e-9
        limits.append(LinearConstraint(flat[None] / scale, *bounds))
    harm = np.concatenate(list(harms))
    harm = harm / (float(np.abs(harm).max()) or 1.0)
    options = {"node_limit": _NODES, "mip_rel_gap": _GAP}
    result = milp(harm, constraints=limits, integrality=np.ones(len(harm)), bounds=Bounds(0, 1), options=options)
    found = [] if walked is None else [walked[0]]
    if result.x is not None:
        parts = np.split(result.x, np.cumsum(sizes)[:-1])
        found.append(np.array([int(part.argmax()) for part in parts], dtype=np.int64))
    # After so many nodes the solver has nothing, or may have less than the walk.
    return min(found, key=lambda plan: sum(row[c] for row, c in zip(harms, plan, strict=True)), default=None)


def _implied(other: Price, price: Price, most: float) -> bool:
    """Returns whether a plan that costs at most `most` keeps the bound on another cost, because it is the same one."""
    same = other.base == price.base and all(map(np.array_equal, other.tables, price.tables))
    return same and other.least == -np.inf and other.most >= most


def solved(
    plan: Ints,
    predict: Callable[[Ints], tuple[Floats, Floats]],
    price: Price,
    budget: float,
    others: Sequence[Price],
    rng: np.random.Generator,
) -> Ints:
    """Returns what the integer program makes of the surrogate around a plan, `[plans, units]`: none, one or two.

    With one cost it is solved by its relaxation, to one unit's step: what is proposed of it is searched further.
    The second one is given the losses as they may be, drawn from the surrogate's uncertainty.

    Args:
        plan: of the front.
        predict: mean and standard deviation of plans.
        price, budget, others: see `cheapest_harm`.
        rng: of the draws.
    """
    sizes = [len(table) for table in price.tables]
    mean, deviation = predict(steps(plan, sizes))
    here = predict(plan[None])[0][0]
    found = []
    for spread in (0.0, 1.0):
        losses = iter(here - mean - spread * deviation * rng.standard_normal(len(mean)))
        harms = [np.array([0.0 if c == plan[u] else next(losses) for c in range(size)]) for u, size in enumerate(sizes)]
        made = cheapest_harm(harms, price, budget, others, np.inf)
        if made is not None:
            found.append(made)
    return np.array(found, dtype=np.int64).reshape(-1, len(sizes))
