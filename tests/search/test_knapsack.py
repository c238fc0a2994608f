"""The walk along the hulls against HiGHS and enumeration, and what a proposal of the surrogate costs in calls."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from lq_plugin.errors import QuantizationError
from lq_plugin.search import Problem, SurrogateSampler
from lq_plugin.search.surrogate import candidates, sampler as sampler_module
from lq_plugin.search.surrogate.candidates import Price, cheapest_harm
from lq_plugin.search.surrogate.knapsack import hull, walk
from lq_plugin.search.surrogate.regression import Features, Regression

from .test_surrogate import CHOICES, in_memory, make_space, propose, tell


def drawn(seed: int, units: int, choices: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    prices = [rng.uniform(1, 10) * rng.permutation(choices) for _ in range(units)]
    harms = [rng.lognormal(0, 1) * 4.0 ** -rng.random(choices) - 0.1 * rng.random(choices) for _ in range(units)]
    return harms, prices


@pytest.mark.parametrize("seed", range(20))
def test_its_excess_is_no_less_than_the_true_one(seed: int) -> None:
    harms, prices = drawn(seed, 5, 4)
    plans = np.array(list(product(range(4), repeat=5)))
    harm = sum(row[plans[:, unit]] for unit, row in enumerate(harms))
    price = sum(row[plans[:, unit]] for unit, row in enumerate(prices))
    for share in (0.05, 0.3, 0.6, 0.9, 1.0):
        budget = float(price.min() + share * (price.max() - price.min()))
        made = walk(harms, prices, budget)
        assert made is not None
        plan, excess = made
        found = sum(float(row[c]) for row, c in zip(harms, plan, strict=True))
        assert sum(float(row[c]) for row, c in zip(prices, plan, strict=True)) <= budget + 1e-9
        least = float(harm[price <= budget + 1e-9].min())
        assert least - 1e-9 <= found <= least + excess + 1e-9
    assert walk(harms, prices, float(price.min()) - 0.1) is None


@pytest.mark.parametrize("seed", range(3))
def test_of_many_units_it_is_as_good_as_highs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    harms, prices = drawn(seed, 60, 8)
    price = Price(2.0, prices)
    budget = 2.0 + 0.4 * sum(float(row.max()) for row in prices)
    exact = cheapest_harm(harms, price, budget, gap=0.0)
    monkeypatch.setattr(candidates, "milp", None)
    quick = cheapest_harm(harms, price, budget, gap=np.inf)
    # A bound on the same cost asks for nothing more.
    bounded = cheapest_harm(harms, price, budget, [Price(2.0, prices, most=budget + 1)], gap=np.inf)
    assert exact is not None
    assert quick is not None
    assert bounded is not None
    assert (quick == bounded).all()
    assert price.of(quick[None])[0] <= budget + 1e-6
    least = sum(float(row.min()) for row in harms)
    one, other = (sum(float(row[c]) for row, c in zip(harms, plan, strict=True)) - least for plan in (exact, quick))
    assert other <= one + 1e-3 * sum(float(np.ptp(row)) for row in harms)


def test_the_hull_leaves_out_what_is_dear_or_harmful() -> None:
    assert hull(np.array([3.0, 1.0, 2.0, 2.0]), np.array([1.0, 4.0, 5.0, 3.9])) == [1, 0]
    assert hull(np.array([1.0, 1.0]), np.array([2.0, 2.0])) == [0]


@pytest.mark.parametrize("units", [20, 60, 300])
def test_a_proposal_makes_few_predictions_and_no_integer_program(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space(units)
    rng = np.random.default_rng(0)
    harm = {u.name: {str(c): float(rng.lognormal()) * 4.0**-c.bit_width for c in CHOICES} for u in space.units}
    sizes = rng.uniform(1, 10, units)
    tables = {
        u.name: {str(c): float(size * c.bit_width) for c in CHOICES} for u, size in zip(space.units, sizes, strict=True)
    }
    problem = Problem(space, harm, [(1.0, tables)])
    study, made = in_memory(), SurrogateSampler(0)
    made.attach(problem)
    for _ in range(12):
        plan = rng.integers(0, len(CHOICES), units)
        cost = float(problem.costs[0].of(plan[None])[0])
        tell(study, problem, problem.params(plan), [1 / (1 + float(rng.random()) + 1000 / cost), cost])
    propose(made, study)  # chooses the prior, which the next trials have also
    rows: list[int] = []
    fits: list[int] = []
    predict, likeliest = Regression.predict, sampler_module.likeliest

    def counted(self: Regression, plans: Any) -> Any:
        if len(plans) > 512:
            return predict(self, plans)  # part by part, each of which comes here
        rows.append(len(plans))
        return predict(self, plans)

    def fitted(*given: Any) -> Any:
        fits.append(1)
        return likeliest(*given)

    monkeypatch.setattr(Regression, "predict", counted)
    monkeypatch.setattr(sampler_module, "likeliest", fitted)
    monkeypatch.setattr(candidates, "milp", None)
    propose(made, study)
    # Neighbours of three plans of the front and of the best one, and those of the integer program's plan.
    choices = units * (len(CHOICES) - 1)
    assert sum(rows) <= choices + 4 * (min(choices, 1024) + 256) + 10
    assert not fits


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_harms_that_are_no_numbers_are_named(value: float) -> None:
    space = make_space(2)
    harm = {"layer1.weight": {str(CHOICES[2]): value}}
    with pytest.raises(QuantizationError, match=rf"that of layer1.weight, {CHOICES[2]} is {value}"):
        Problem(space, harm, [])
    with pytest.raises(QuantizationError, match="harms are finite numbers, those of unit 1 are"):
        Features([np.array([1.0, 2.0]), np.array([1.0, value])])
