"""Seeds against brute force, and sensitivities against formulas that are written out here."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.plan import LayerInfo
from lq_plugin.search import Evaluator, Space, search
from lq_plugin.search.seeds import greedy_path, ilp, make_seeds, unit_costs
from lq_plugin.search.sensitivity import GRADIENT, MEASURES, measure_sensitivity

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


@pytest.mark.parametrize("measure", MEASURES)
def test_fewer_bits_are_worse_by_every_measure(evaluator: Evaluator, measure: str) -> None:
    table = measure_sensitivity(evaluator, measure, batches=1)
    assert set(table.values) == {unit.name for unit in evaluator.space.units}
    total = {bits: sum(v for values in table.values.values() for c, v in values.items() if c.startswith(f"int{bits}")) for bits in BITS}
    assert total[2] > total[4] > total[8] >= 0
    assert table.rows()[0]["unit"] == max(table.values, key=lambda name: max(table.values[name].values()))
    assert all(q is None for layer in evaluator.layers.values() for q in (layer.weight_quantizer, layer.input_quantizer)), "float again"


def test_the_measures_are_what_their_formulas_say(evaluator: Evaluator) -> None:
    model, data = evaluator.model, DigitsDataModule(batch_size=120)
    data.setup("fit")
    kl, sqnr = (measure_sensitivity(evaluator, name, batches=1).values for name in ("kl", "sqnr"))
    fisher, first = (measure_sensitivity(evaluator, name, batches=1).values for name in ("fisher", "first_order"))
    torch.manual_seed(evaluator.seed)
    x, y = next(iter(data.train_dataloader()))
    name, layer = "head.2", evaluator.layers["head.2"]
    unit, choice = f"{name}.weight", "int2 mse"
    evaluator.apply({})
    model.eval()
    z = model(x).detach().double()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), layer.weight.requires_grad_(True))
    evaluator.apply(evaluator.layer_plans({"rules": [{"match": name, "weight": choice}]}))
    q = model(x).detach().double()
    change = (layer.quantized_weight() - layer.weight).detach()
    evaluator.apply({})
    p = torch.softmax(z, -1)
    assert sqnr[unit][choice] == pytest.approx(float((z - q).square().sum() / z.square().sum()), rel=0.2)
    assert kl[unit][choice] == pytest.approx(float((p * (p.log() - torch.log_softmax(q, -1))).sum(-1).mean()), rel=0.3)
    expected = 0.5 * float((gradient.square() * change.square()).sum())
    assert fisher[unit][choice] == pytest.approx(expected, rel=0.5)
    assert first[unit][choice] >= fisher[unit][choice]


def test_measures_that_do_not_fit_are_refused(evaluator: Evaluator, model: DigitsCNN) -> None:
    with pytest.raises(QuantizationError, match="unknown sensitivity measure 'kll'.*Did you mean 'kl'"):
        measure_sensitivity(evaluator, "kll")
    space = {"weight": "int4", "input": {"bit_widths": [4, 8], "ranges": ["minmax"], "signed": False, "affine": True}}
    with Evaluator(model, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as other:
        other.calibrate(space)
        for name in GRADIENT:
            with pytest.raises(QuantizationError, match=f"measure '{name}' is for weights; stem.0.input"):
                measure_sensitivity(other, name, 1)


def test_a_search_starts_from_its_seeds(model: DigitsCNN) -> None:
    result = search(
        model, DigitsDataModule(batch_size=120), SPACE, "val/acc", 9, seeds=5, sensitivity_batches=1, trainer=CPU, calibration_batches=1,
        progress=False, constraints="effective_bits <= 6",
    )  # fmt: skip
    origins = [c.origin for c in result.candidates]
    assert origins[:2] == ["uniform 2 bits", "uniform 4 bits"], "8 bits are too many"
    assert 2 < sum(origin.startswith(("ilp", "greedy")) for origin in origins) <= 5
    assert all(c.effective_bits <= 6 for c in result.candidates)
