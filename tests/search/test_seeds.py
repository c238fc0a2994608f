"""Seeds against brute force."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import LayerInfo
from lq_plugin.search import Evaluator, Space, search
from lq_plugin.search.study.seeds import greedy_path, ilp, make_seeds, unit_costs

from .conftest import CPU

BITS = [2, 4, 8]
SPACE: dict[str, Any] = {"weight": {"bit_widths": BITS, "ranges": ["mse"]}}


def layers(count: int) -> list[LayerInfo]:
    return [LayerInfo(f"layer{i}", ("Linear",), 8, ("weight",)) for i in range(count)]


@st.composite
def problems(draw: Any) -> Any:
    space = Space.parse(SPACE).bind(layers(draw(st.integers(1, 4))))
    number = st.floats(0, 100, allow_nan=False)
    harm = {u.name: {str(c): draw(number) for c in u.choices} for u in space.units}
    size = {u.name: draw(st.integers(1, 50)) for u in space.units}
    costs = {u.name: {str(c): float(size[u.name] * c.bit_width) for c in u.choices} for u in space.units}
    return space, harm, costs, draw(st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_integer_program_finds_the_best_of_all_plans(problem: Any) -> None:
    space, harm, costs, share = problem
    plans = list(itertools.product(*(unit.choices for unit in space.units)))

    def total(table: Any, plan: Any) -> float:
        return sum(table[unit.name][str(choice)] for unit, choice in zip(space.units, plan, strict=True))

    prices = [total(costs, plan) for plan in plans]
    budget = min(prices) + share * (max(prices) - min(prices))
    best = min(total(harm, plan) for plan, price in zip(plans, prices, strict=True) if price <= budget + 1e-9)
    params = ilp(space, harm, costs, budget)
    chosen = [unit.choice(params) for unit in space.units]
    assert total(costs, chosen) <= budget + 1e-6
    assert total(harm, chosen) == pytest.approx(best, rel=1e-6, abs=1e-4)

    path = greedy_path(space, harm, costs)
    assert all(a > b for (a, _), (b, _) in itertools.pairwise(path)), "each step saves"
    assert path[-1][0] == pytest.approx(min(prices))
    assert path[0][0] >= path[-1][0]


def test_a_budget_that_no_plan_meets_names_the_smallest() -> None:
    space = Space.parse(SPACE).bind(layers(2))
    costs = {unit.name: {str(c): float(c.bit_width) for c in unit.choices} for unit in space.units}
    with pytest.raises(QuantizationError, match="no plan costs at most 3: the smallest costs 4"):
        ilp(space, costs, costs, 3.0)
    seeds = make_seeds(space, {u: {c: 1 / v for c, v in t.items()} for u, t in costs.items()}, costs, 0.0, 5, most=9.0)
    assert 1 < len(seeds) <= 5
    assert all(sum(seed.params.values()) <= 9 for seed in seeds)


@pytest.fixture(scope="module")
def evaluator(trained: DigitsCNN) -> Any:
    fresh = DigitsCNN(width=8)
    fresh.load_state_dict(trained.state_dict())
    with Evaluator(fresh, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as made:
        made.calibrate(SPACE)
        yield made


def test_costs_add_up_to_the_cost_of_the_plan(evaluator: Evaluator) -> None:
    base, costs = unit_costs(evaluator, "effective_bits")
    generator = np.random.default_rng(0)
    for _ in range(5):
        chosen = {unit.name: unit.choices[generator.integers(len(unit.choices))] for unit in evaluator.space.units}
        params = {key: value for unit in evaluator.space.units for key, value in unit.params(chosen[unit.name]).items()}
        expected = evaluator.cost(evaluator.space.layer_plans(params)).effective_bits
        assert base + sum(costs[name][str(choice)] for name, choice in chosen.items()) == pytest.approx(expected)


def test_a_search_starts_from_its_seeds(model: DigitsCNN) -> None:
    result = search(
        model, DigitsDataModule(batch_size=120), SPACE, "val/acc", 9, seeds=5, sensitivity_batches=1, trainer=CPU,
        calibration_batches=1,
        progress=False, constraints="effective_bits <= 6",
    )  # fmt: skip
    origins = [c.origin for c in result.candidates]
    assert origins[:2] == ["uniform 2 bits", "uniform 4 bits"], "8 bits are too many"
    assert 2 < sum(origin.startswith(("ilp", "greedy")) for origin in origins) <= 5
    assert all(c.effective_bits <= 6 for c in result.candidates)


def test_seeds_are_spread_over_the_budgets_and_each_is_the_best_of_its_size() -> None:
    space = Space.parse(SPACE).bind(layers(4))
    costs = {
        unit.name: {str(c): float(c.bit_width * (i + 1)) for c in unit.choices} for i, unit in enumerate(space.units)
    }
    harm = {
        unit.name: {str(c): (4 - i) * 4.0**-c.bit_width for c in unit.choices} for i, unit in enumerate(space.units)
    }
    seeds = make_seeds(space, harm, costs, 100.0, 8)
    assert len({frozenset(seed.params.items()) for seed in seeds}) == len(seeds) <= 8
    best: dict[float, float] = {}
    for plan in itertools.product(*(unit.choices for unit in space.units)):
        price, total = (sum(t[u.name][str(c)] for u, c in zip(space.units, plan, strict=True)) for t in (costs, harm))
        best[price] = min(best.get(price, np.inf), total)
    for seed in seeds:
        chosen = {unit.name: str(unit.choice(seed.params)) for unit in space.units}
        price, total = (sum(t[name][choice] for name, choice in chosen.items()) for t in (costs, harm))
        kind, budget = seed.origin.split()
        assert 100 + price <= float(budget) * 1.005, "the origin has three digits"
        if kind == "ilp":
            assert total == pytest.approx(min(value for cost, value in best.items() if cost <= price))


def test_tied_layers_are_chosen_once() -> None:
    space = Space.parse(SPACE | {"tie": ["layer[01]"]}).bind(layers(3))
    assert [len(unit.layers) for unit in space.units] == [2, 1]
    costs = {unit.name: {str(c): float(c.bit_width * len(unit.layers)) for c in unit.choices} for unit in space.units}
    harm = {unit.name: {str(c): 1.0 / c.bit_width for c in unit.choices} for unit in space.units}
    plans = space.layer_plans(ilp(space, harm, costs, 16.0))
    assert [plans[f"layer{i}"].weight.bit_width for i in range(3)] == [4, 4, 8]
