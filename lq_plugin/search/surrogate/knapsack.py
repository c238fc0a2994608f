"""The multiple-choice knapsack problem in a moment: one choice for each unit, least harm within a budget.

min Σ h(u, c_u) with Σ p(u, c_u) ≤ budget. Its relaxation walks along the lower hulls of (p, h), always the step that
spares most harm for its price, and is fractional in one unit at most (Sinha, Zoltners, "The multiple-choice knapsack
problem", Operations Research 27, 1979). The walk without that step, completed by single changes that still fit, is a
plan; how far it may be from the best one is known from the relaxation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lq_plugin.search.surrogate.regression import Floats, Ints


def hull(prices: Floats, harms: Floats) -> list[int]:
    """Returns the choices on the lower hull, from the cheapest to the least harmful; steps spare ever less.

    >>> hull(np.array([1.0, 2.0, 3.0, 4.0]), np.array([9.0, 5.0, 4.5, 1.0]))
    [0, 1, 3]
    """
    found: list[int] = []
    for choice in np.lexsort((harms, prices)).tolist():
        if found and harms[choice] >= harms[found[-1]]:
            continue
        while len(found) > 1 and _spared(prices, harms, found[-2], found[-1]) <= _spared(
            prices, harms, found[-2], choice
        ):
            found.pop()
        found.append(choice)
    return found


def walk(harms: Sequence[Floats], prices: Sequence[Floats], budget: float) -> tuple[Ints, float] | None:
    """Returns a plan within the budget, and by how much its harm may exceed the least one; None where none fits.

    Args:
        harms, prices: of each choice of each unit; finite.
        budget: of the whole plan.
    """
    hulls = [hull(price, harm) for price, harm in zip(prices, harms, strict=True)]
    plan = np.array([line[0] for line in hulls], dtype=np.int64)
    left = budget - sum(float(price[c]) for price, c in zip(prices, plan, strict=True))
    if left < 0:
        return None
    steps = [
        (-_spared(prices[u], harms[u], a, b), u, place, b)
        for u, line in enumerate(hulls)
        for place, (a, b) in enumerate(pairwise(line))
    ]
    at = [0] * len(hulls)
    excess: float | None = None
    for gain, unit, place, choice in sorted(steps):
        price = float(prices[unit][choice] - prices[unit][plan[unit]])
        if place != at[unit]:
            continue  # the step before it did not fit
        if price <= left:
            if excess is not None:
                excess += gain * price
            plan[unit], at[unit], left = choice, place + 1, left - price
        elif excess is None:
            # What the relaxation takes of this step.
            excess = -gain * left
    while (better := _change(harms, prices, plan, left)) is not None:
        unit, choice = better
        if excess is not None:
            excess -= float(harms[unit][plan[unit]] - harms[unit][choice])
        left -= float(prices[unit][choice] - prices[unit][plan[unit]])
        plan[unit] = choice
    return plan, max(excess or 0.0, 0.0)


def _spared(prices: Floats, harms: Floats, before: int, after: int) -> float:
    return float((harms[before] - harms[after]) / (prices[after] - prices[before]))


def _change(harms: Sequence[Floats], prices: Sequence[Floats], plan: Ints, left: float) -> tuple[int, int] | None:
    """Returns the change of one unit that spares most harm and costs at most `left`."""
    best, found = 0.0, None
    for unit, (harm, price) in enumerate(zip(harms, prices, strict=True)):
        spared = np.where(price - price[plan[unit]] <= left, harm[plan[unit]] - harm, 0.0)
        choice = int(spared.argmax())
        if spared[choice] > best:
            best, found = float(spared[choice]), (unit, choice)
    return found
