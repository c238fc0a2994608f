"""Plans that are good before anything is searched, from the sensitivity and the cost of each tensor.

The model is additive, as in HAWQ-V3 (Yao et al., ICML 2021, arXiv 2011.10680, equation 8): quantizing several tensors
harms as much as the sum of each alone. Then the best plan of a size is an integer program, min Σ s(u, c) x(u, c) with
one choice c for each unit u and Σ cost(u, c) x(u, c) within the budget. Pairs that were measured add cross(i, j) x(i)
x(j), the quadratic program of CLADO (Deng et al., DAC 2025, arXiv 2307.05657), whose products become variables of
their own: z <= x(i), z <= x(j) where a pair harms less than its sum, z >= x(i) + x(j) - 1 where it harms more. The
greedy path solves the program without pairs and without a solver: from the widest plan on, always the step that harms
least for what it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lq_plugin.errors import QuantizationError
from lq_plugin.search.evaluation.costs import ACTIVATION_MEMORY
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.sensitivity.pairs import Pair
from lq_plugin.search.space.model_space import Choice, ModelSpace, Params, bits_of, params_of

#: By unit and choice (as text): a sensitivity, or a cost.
Table = Mapping[str, Mapping[str, float]]
#: A quadratic program is solved to that share of its optimum, or so many nodes: its sensitivities are no more exact.
_WITH_PAIRS = {"mip_rel_gap": 1e-3, "node_limit": 1000}


@dataclass(frozen=True)
class Seed:
    """A plan to start a search with.

    Args:
        params: its parameters.
        origin: where it comes from: `"ilp 3.5"` or `"greedy 3.5"`, with the budget.
    """

    params: Params
    origin: str


def unit_costs(evaluator: Evaluator, cost: str) -> tuple[float, dict[str, dict[str, float]]]:
    """Returns the cost of the plan of first choices, and the difference that each choice of each unit makes to it.

    Exact for effective bits and `bytes`, which are sums over layers. `bops` and `energy` multiply the bits of weight
    and input of a layer, so they are exact where one of the two is fixed; so are those of `latency`.
    `activation_memory` is a largest sum: for it stands the mean over all moments of a pass, on a scale that is right
    for the smallest and the largest plan.

    Args:
        evaluator: calibrated.
        cost: one of `lq_plugin.search.evaluation.costs.COSTS`.

    Returns:
        The cost of the plan of first choices, and the differences by unit and choice (as text).
    """
    space = evaluator.space
    assert space is not None
    first = params_of(space.units, lambda unit: unit.choices[0])
    memory = evaluator.memory if cost == ACTIVATION_MEMORY else None

    def exact(params: Params) -> float:
        return evaluator.costs(space.layer_plans(params))[cost]

    def total(params: Params) -> float:
        return exact(params) if memory is None else float(sum(memory.held(space.layer_plans(params))))

    base = total(first)
    costs = {unit.name: {str(c): total(first | unit.params(c)) - base for c in unit.choices} for unit in space.units}
    if memory is None:
        return base, costs
    small = params_of(space.units, lambda unit: min(unit.choices, key=bits_of))
    large = params_of(space.units, lambda unit: max(unit.choices, key=bits_of))
    span = total(large) - total(small)
    scale = (exact(large) - exact(small)) / span if span else 0.0
    return exact(small) + scale * (base - total(small)), {
        name: {choice: scale * value for choice, value in row.items()} for name, row in costs.items()
    }


def smallest_plan(space: ModelSpace, costs: Table) -> Params:
    """Returns the cheapest plan, for a cost that no wider choice makes smaller, as all but `latency` are.

    Each unit has the choice that is cheapest while others have their first one; of equally cheap ones the narrowest.

    Args:
        space: what may be chosen.
        costs: of each choice, see `unit_costs`.
    """
    return params_of(space.units, lambda unit: min(unit.choices, key=lambda c: (costs[unit.name][str(c)], bits_of(c))))


def smallest_cost(base: float, costs: Table) -> float:
    """Returns the cost of the smallest plan, from what `unit_costs` returns."""
    return base + sum(min(values.values()) for values in costs.values())


def ilp(
    space: ModelSpace,
    sensitivity: Table,
    costs: Table,
    budget: float,
    base: float = 0.0,
    pairs: Sequence[Pair] = (),
) -> Params:
    """Returns the plan of least summed sensitivity whose cost is at most `budget`.

    Args:
        space: what may be chosen.
        sensitivity: harm of each choice.
        costs, base: see `unit_costs`.
        budget: `base` and the costs of all choices together may be that much.
        pairs: that were measured.

    Raises:
        QuantizationError: no plan is so small; it names the smallest.
    """
    options = [(unit.name, choice, unit) for unit in space.units for choice in unit.choices]
    harm = np.array([sensitivity.get(name, {}).get(str(choice), 0.0) for name, choice, _ in options])
    price = np.array([costs[name][str(choice)] for name, choice, _ in options])
    smallest = smallest_cost(base, costs)
    if smallest > budget * (1 + 1e-9):
        raise QuantizationError(f"no plan costs at most {budget:g}: the smallest costs {smallest:.6g}")
    # After the choices come the products of the pairs.
    columns = len(options) + len(pairs)
    units = {unit.name: row for row, unit in enumerate(space.units)}
    places = {(name, str(choice)): i for i, (name, choice, _) in enumerate(options)}
    entries = [(units[name], i, 1.0) for i, (name, *_) in enumerate(options)]
    lower, upper = [1.0] * len(units), [1.0] * len(units)
    entries += [(len(lower), i, float(each)) for i, each in enumerate(price)]
    lower.append(-np.inf)
    upper.append(budget - base + 1e-9 * max(abs(budget), 1.0))
    for k, pair in enumerate(pairs, len(options)):
        i, j = places[pair.unit, pair.choice], places[pair.other, pair.other_choice]
        for limited in ((i, j),) if pair.cross > 0 else ((i,), (j,)):
            entries += [*((len(lower), each, 1.0) for each in limited), (len(lower), k, -1.0)]
            lower.append(-np.inf if pair.cross > 0 else 0.0)
            upper.append(1.0 if pair.cross > 0 else np.inf)
    row, column, factor = zip(*entries, strict=True)
    rows = csr_array((factor, (row, column)), shape=(len(lower), columns))
    harm = np.concatenate([harm, [pair.cross for pair in pairs]])
    whole = [*[1] * len(options), *[0] * len(pairs)]
    # Scaled, since the solver's tolerances are absolute.
    result = milp(
        harm / max(np.abs(harm).max(), 1e-300),
        constraints=LinearConstraint(rows, lower, upper),
        integrality=whole,
        bounds=Bounds(0, 1),
        options=_WITH_PAIRS if pairs else None,
    )
    if result.x is None:
        raise QuantizationError(f"the integer program for a budget of {budget:g} failed: {result.message}")
    chosen = {unit.name: choice for (_, choice, unit), taken in zip(options, result.x, strict=False) if taken > 0.5}
    return params_of(space.units, lambda unit: chosen[unit.name])


def greedy_path(space: ModelSpace, sensitivity: Table, costs: Table, base: float = 0.0) -> list[tuple[float, Params]]:
    """Returns `(cost, plan)` from the least sensitive plan to one of the smallest, changing one unit at a time.

    Args:
        space: what may be chosen.
        sensitivity: harm of each choice.
        costs, base: see `unit_costs`.
    """

    def harm(unit_name: str, choice: Choice) -> float:
        return sensitivity.get(unit_name, {}).get(str(choice), 0.0)

    now: dict[str, Choice] = {
        u.name: min(u.choices, key=lambda c: (harm(u.name, c), costs[u.name][str(c)])) for u in space.units
    }
    choices = {unit.name: unit.choices for unit in space.units}
    path = []
    while True:
        cost = base + sum(costs[name][str(choice)] for name, choice in now.items())
        path.append((cost, params_of(space.units, lambda unit: now[unit.name])))
        steps = []
        for name, choice in now.items():
            for other in choices[name]:
                saved = costs[name][str(choice)] - costs[name][str(other)]
                if saved > 0:
                    steps.append(((harm(name, other) - harm(name, choice)) / saved, -saved, name, other))
        if not steps:
            return path
        _, _, name, other = min(steps, key=lambda step: step[:2])
        now[name] = other


def make_seeds(
    space: ModelSpace,
    sensitivity: Table,
    costs: Table,
    base: float,
    count: int,
    most: float = np.inf,
    pairs: Sequence[Pair] = (),
) -> list[Seed]:
    """Returns up to `count` plans: the best for each of as many budgets, which are denser where they are smaller.

    Those of the integer program come first, then those of the greedy path.

    Args:
        space: what may be chosen.
        sensitivity: harm of each choice.
        costs, base: see `unit_costs`.
        count: number of budgets between the smallest and the largest plan.
        most: no plan may cost more.
        pairs: that were measured; the greedy path does without them.
    """
    low = smallest_cost(base, costs)
    if count < 1 or low > most:
        return []
    high = min(base + sum(max(values.values()) for values in costs.values()), most)
    budgets = np.geomspace(low, high, count + 2)[1:-1] if low > 0 else np.linspace(low, high, count + 2)[1:-1]
    path = greedy_path(space, sensitivity, costs, base)
    found = [Seed(ilp(space, sensitivity, costs, float(b), base, pairs), f"ilp {b:.3g}") for b in budgets]
    for budget in budgets:
        fitting = next((params for cost, params in path if cost <= budget), None)
        if fitting is not None:
            found.append(Seed(fitting, f"greedy {budget:.3g}"))
    return distinct(found)[:count]


def distinct(seeds: Iterable[Seed]) -> list[Seed]:
    """Returns each plan once, the first of equal ones."""
    return list({frozenset(seed.params.items()): seed for seed in reversed(list(seeds))}.values())[::-1]
