"""Pairs of choices that are measured together, and the plans that are chosen by them, against hand computation."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from optuna.storages import InMemoryStorage

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import LayerInfo
from lq_plugin.search import Evaluator, SearchConfig, Space, SurrogateSampler, search
from lq_plugin.search.sensitivity.pairs import Pair, influential_pairs, measure_pairs
from lq_plugin.search.space.model_space import ModelSpace
from lq_plugin.search.study.seeds import ilp
from lq_plugin.search.surrogate.regression import Features

from .conftest import CPU

SPACE: dict[str, Any] = {"weight": {"bit_widths": [2, 4, 8], "ranges": ["mse"]}}
BOTH: dict[str, Any] = SPACE | {"input": {"bit_widths": [2, 8], "affine": True, "signed": False, "ranges": ["mse"]}}


def space_of(count: int) -> ModelSpace:
    return Space.parse(SPACE).bind([LayerInfo(f"layer{i}", ("Linear",), 8, ("weight",)) for i in range(count)])


@pytest.fixture
def evaluator(model: DigitsCNN) -> Any:
    with Evaluator(model, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as made:
        made.calibrate(BOTH)
        yield made


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def test_a_pair_harms_by_what_both_do_beyond_their_sum(evaluator: Evaluator) -> None:
    assert evaluator.space is not None
    units = {unit.name: unit for unit in evaluator.space.units}
    chosen = [("stem.0.weight", 0), ("block.conv2.weight", 0), ("block.conv2.input", 0)]
    changes = [(units[name], units[name].choices[i]) for name, i in chosen]
    kept: list[torch.Tensor] = []
    hook = evaluator.layers["stem.0"].register_forward_pre_hook(lambda m, args: kept.append(args[0].clone()))
    found = measure_pairs(evaluator, "kl", [(changes[0], changes[1]), (changes[1], changes[2])], batches=1)
    hook.remove()
    # A batch is run in parts, each anew for every change; validation images come after the last one.
    data = torch.cat([part for i, part in enumerate(kept) if not any(same(part, other) for other in kept[:i])])[:120]
    model = evaluator.model.eval()

    def log_probabilities(*rules: dict[str, str]) -> torch.Tensor:
        evaluator.apply(evaluator.layer_plans({"rules": list(rules)}) if rules else {})
        with torch.no_grad():
            return torch.log_softmax(model(data).double(), -1)

    reference = log_probabilities()
    specs = [str(choice) for _, choice in changes]
    first, weight, both = (
        {"match": "stem.0", "weight": specs[0]},
        {"match": "block.conv2", "weight": specs[1]},
        {"match": "block.conv2", "weight": specs[1], "input": specs[2]},
    )
    for pair, rules, singles in zip(
        found,
        ([first, weight], [both]),
        (([first], [weight]), ([weight], [{"match": "block.conv2", "input": specs[2]}])),
        strict=True,
    ):
        kl = [
            float((reference.exp() * (reference - log_probabilities(*each))).sum(-1).mean())
            for each in (rules, *singles)
        ]
        assert pair.cross == pytest.approx(kl[0] - kl[1] - kl[2], rel=1e-3, abs=1e-5)
        assert abs(pair.cross) > 1e-4, "the pair is more, or less, than its sum"
    evaluator.apply({})
    assert Pair(*found[0].row()) == found[0]


def test_the_pairs_that_count_most_in_good_plans_come_first() -> None:
    space = space_of(3)
    two, four = space.units[0].choices[0], space.units[0].choices[1]
    harm = {
        u.name: dict(zip(map(str, u.choices), row, strict=True))
        for u, row in zip(space.units, [(1.0, 0.25, 0.0), (0.36, 0.09, 0.0), (0.04, 0.01, 0.0)], strict=True)
    }
    plan = {k: v for u in space.units for k, v in u.params(two).items()}
    found = influential_pairs(space, harm, [plan], 2)
    assert [[(unit.name, str(choice)) for unit, choice in pair] for pair in found] == [
        [("layer0.weight", str(two)), ("layer1.weight", str(two))],  # 2 sqrt(0.36) of 1.4
        [("layer0.weight", str(two)), ("layer2.weight", str(two))],  # 2 sqrt(0.04)
    ]
    other = plan | space.units[0].params(four)
    # Twice in two plans: 2 sqrt(0.0144) / 1.4 + 2 sqrt(0.0144) / 0.65 is more than once 2 sqrt(0.04) / 1.4.
    last = influential_pairs(space, harm, [plan, other], 9)
    names = [{unit.name for unit, _ in pair} for pair in last]
    assert names.index({"layer1.weight", "layer2.weight"}) < names.index({"layer0.weight", "layer2.weight"})
    exact = {k: v for u in space.units for k, v in u.params(u.choices[2]).items()}
    assert influential_pairs(space, harm, [exact], 9) == [], "what harms nothing has no pairs"


@st.composite
def problems(draw: Any) -> Any:
    space = space_of(draw(st.integers(2, 4)))
    number = st.floats(0, 100, allow_nan=False)
    harm = {u.name: {str(c): draw(number) for c in u.choices} for u in space.units}
    costs = {u.name: {str(c): float((i + 1) * c.bit_width) for c in u.choices} for i, u in enumerate(space.units)}
    ends = [((u, c), (v, d)) for u, v in itertools.combinations(space.units, 2) for c in u.choices for d in v.choices]
    some = draw(st.lists(st.sampled_from(range(len(ends))), max_size=12, unique=True))
    pairs = []
    for i in some:
        (u, c), (v, d) = ends[i]
        rho = draw(st.floats(-0.9, 0.9))
        cross = 2 * rho * float(np.sqrt(harm[u.name][str(c)] * harm[v.name][str(d)]))
        pairs.append(Pair(u.name, str(c), v.name, str(d), cross))
    return space, harm, costs, pairs, draw(st.floats(0, 1))


def quadratic(harm: Any, pairs: list[Pair], chosen: dict[str, str]) -> float:
    """The harm of a plan, by the choice of each unit."""
    total = sum(harm[name][choice] for name, choice in chosen.items())
    return total + sum(p.cross for p in pairs if chosen[p.unit] == p.choice and chosen[p.other] == p.other_choice)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_the_quadratic_program_finds_the_best_of_all_plans(problem: Any) -> None:
    space, harm, costs, pairs, share = problem
    plans = [
        {u.name: str(c) for u, c in zip(space.units, choices, strict=True)}
        for choices in itertools.product(*(u.choices for u in space.units))
    ]
    prices = [sum(costs[name][choice] for name, choice in plan.items()) for plan in plans]
    budget = min(prices) + share * (max(prices) - min(prices))
    fitting = [plan for plan, price in zip(plans, prices, strict=True) if price <= budget + 1e-9]
    best = min(quadratic(harm, pairs, plan) for plan in fitting)
    params = ilp(space, harm, costs, budget, pairs=pairs)
    chosen = {u.name: str(u.choice(params)) for u in space.units}
    assert chosen in fitting
    largest = max(max(row.values()) for row in harm.values())
    # The solver stops within a thousandth of the optimum.
    assert quadratic(harm, pairs, chosen) == pytest.approx(best, rel=2e-3, abs=1e-4 * max(largest, 1.0))


def test_the_surrogate_begins_with_the_harm_of_measured_pairs() -> None:
    harms = [np.array([1.0, 0.1]), np.array([0.5, 0.2])]
    pairs = [(0, 0, 1, 0, 0.5), (0, 1, 1, 0, -0.3), (0, 0, 1, 1, -5.0)]
    plans = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    log_harm, shares = Features(harms, pairs).shares(plans)
    # 1.5 + 0.5; 0.6 - 0.3; 1.2 - 5, of which a tenth of the sum is left; 0.3.
    assert np.exp(log_harm) == pytest.approx([2.0, 0.3, 0.12, 0.3])
    assert shares.sum(1) == pytest.approx([1.0] * 4)
    assert shares[0] == pytest.approx([2 / 3, 1 / 3])


def test_a_search_measures_pairs_once_and_goes_on_with_them(model: DigitsCNN, tmp_path: Any, monkeypatch: Any) -> None:
    import lq_plugin.search.study.worker as worker

    asked: list[int] = []
    measure = worker.measure_pairs

    def counted(evaluator: Evaluator, name: str, pairs: Any, batches: int) -> list[Pair]:
        asked.append(len(pairs))
        return measure(evaluator, name, pairs, batches)

    monkeypatch.setattr(worker, "measure_pairs", counted)
    given = {"space": SPACE, "metric": "val/acc", "trainer": CPU, "progress": False, "seeds": 3, "pairs": 5}
    given |= {"calibration_batches": 1, "sensitivity_batches": 1, "storage": f"sqlite:///{tmp_path}/study.db"}
    for n_trials in (5, 8):
        result = search(model, DigitsDataModule(batch_size=120), n_trials=n_trials, **given)
    assert asked == [5]
    assert len(result.candidates) == 8
    rows = result.study.user_attrs["sensitivity_pairs"]
    assert len(rows) == 5
    assert all(row[0] != row[2] for row in rows)
    sampler = result.study.sampler
    assert isinstance(sampler, SurrogateSampler)
    assert len(sampler.problem.features.pairs) == 5


def test_a_pair_counts_relative_to_the_harm_of_its_plan() -> None:
    """Errors that hardly matter next to others are of no influence, however large they are."""
    space = space_of(4)
    harm = {u.name: dict.fromkeys(map(str, u.choices), 0.0) for u in space.units}
    plans = []
    # The first two units harm most, in a plan that the other two do not make much worse; those harm alone in another.
    for values in ((100.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0)):
        choice = {u.name: u.choices[0] if value else u.choices[2] for u, value in zip(space.units, values, strict=True)}
        for unit, value in zip(space.units, values, strict=True):
            harm[unit.name][str(unit.choices[0])] = max(value, harm[unit.name][str(unit.choices[0])])
        plans.append({k: v for u in space.units for k, v in u.params(choice[u.name]).items()})
    first, second = influential_pairs(space, harm, plans, 9)
    # 2 √(100 · 1) / 101 = 0.198 comes after 2 √(1 · 1) / 2 = 1.
    assert [unit.name for unit, _ in first] == ["layer2.weight", "layer3.weight"]
    assert [unit.name for unit, _ in second] == ["layer0.weight", "layer1.weight"]


def test_the_first_plans_avoid_pairs_that_harm(model: DigitsCNN, monkeypatch: Any) -> None:
    import lq_plugin.search.study.worker as worker

    def harmful(evaluator: Evaluator, name: str, pairs: Any, batches: int) -> list[Pair]:
        return [Pair(u.name, str(c), v.name, str(d), 1e6) for (u, c), (v, d) in pairs]

    monkeypatch.setattr(worker, "measure_pairs", harmful)
    given = {"space": SPACE, "metric": "val/acc", "trainer": CPU, "progress": False, "seeds": 3, "pairs": 5}
    given |= {"calibration_batches": 1, "sensitivity_batches": 1, "uniform": False}
    study = search(model, DigitsDataModule(batch_size=120), n_trials=3, **given).study
    assert isinstance(study.sampler, SurrogateSampler)
    units = study.sampler.problem.units
    chosen = [
        {(unit.name, str(unit.choice(trial.params))) for unit in units}
        for trial in study.trials
        if trial.user_attrs["origin"].startswith("ilp")
    ]
    pairs = [{(p[0], p[1]), (p[2], p[3])} for p in study.user_attrs["sensitivity_pairs"]]
    assert chosen
    assert len(pairs) == 5
    assert not any(pair <= plan for pair in pairs for plan in chosen)


def test_a_study_that_began_without_pairs_says_that_it_measures_none(model: DigitsCNN, caplog: Any) -> None:
    storage = InMemoryStorage()
    for n_trials, pairs in ((2, 0), (3, 5)):
        given = {"space": SPACE, "metric": "val/acc", "trainer": CPU, "progress": False, "seeds": 1, "pairs": pairs}
        given |= {"calibration_batches": 1, "sensitivity_batches": 1, "storage": storage}
        assert "pairs=" not in caplog.text
        search(model, DigitsDataModule(batch_size=120), n_trials=n_trials, **given)
    assert "pairs=5: none are measured, the study has its first plans without pairs" in caplog.messages


def test_many_pairs_take_little_memory() -> None:
    """Of the rows of the program three numbers or fewer are not zero."""
    space = space_of(60)
    harm = {u.name: {str(c): 4.0**-c.bit_width for c in u.choices} for u in space.units}
    costs = {u.name: {str(c): float(c.bit_width) for c in u.choices} for u in space.units}
    plans = [{key: value for u in space.units for key, value in u.params(c).items()} for c in space.units[0].choices]
    pairs = [
        Pair(u.name, str(c), v.name, str(d), 0.1 * 2.0 ** -(c.bit_width + d.bit_width))
        for (u, c), (v, d) in influential_pairs(space, harm, plans, 1500)
    ]
    tracemalloc.start()
    try:
        params = ilp(space, harm, costs, 60 * 8.0, pairs=pairs)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pairs) == 1500
    assert {u.choice(params).bit_width for u in space.units} == {8}
    assert peak < 5e6, "1,561 rows of 1,680 float64 take 21 MB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": -1}, "pairs is an integer, 0 or more, got -1"),
        ({"pairs": 4, "seeds": 0}, "pairs=4 are those of the first plans: seeds is 1 or more then, got 0"),
        ({"pairs": 4, "sensitivity": "fisher"}, "by kl, sqnr, loss, not by 'fisher'"),
        ({"pairs": 4, "sensitivity": "layer_sqnr"}, "by kl, sqnr, loss, not by 'layer_sqnr'"),
    ],
)
def test_what_pairs_cannot_be_measured_by_is_refused_before_any_work(
    model: DigitsCNN, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        SearchConfig(model, DigitsDataModule(), SPACE, "val/acc", **options)
