"""Costs of a search beside bits: energy, memory of activations, and what the cheapest plan costs."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.report.data import ReportData
from lq_plugin.search import COSTS, Evaluator, SearchConfig, SearchResult, SurrogateSampler, search
from lq_plugin.search.evaluation.costs import LABELS
from lq_plugin.search.study.seeds import smallest_plan, unit_costs

from .conftest import CPU

SPACE = {
    "weight": {"bit_widths": [2, 8], "granularities": ["per_channel"], "ranges": ["mse"]},
    "input": ["uint8 affine mse", "uint4 affine mse", "float"],
}
#: Elements of the tensors of `DigitsCNN(width=8)`: after `stem`, after each of `down` and the block's convolutions.
STEM, INNER = 8 * 8 * 8, 16 * 4 * 4


@pytest.fixture(scope="module")
def evaluator(trained: DigitsCNN) -> Any:
    fresh = DigitsCNN(width=8)
    fresh.load_state_dict(trained.state_dict())
    with Evaluator(fresh, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as made:
        made.calibrate(SPACE)
        yield made


def run(model: DigitsCNN, n_trials: int, **options: Any) -> SearchResult:
    given: dict[str, Any] = {"calibration_batches": 1, "progress": False, "trainer": CPU, "seeds": 0} | options
    return search(model, DigitsDataModule(batch_size=120), SPACE, "val/acc", n_trials, **given)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        # While `down` runs, 512 and 256 numbers; in the block three times 256: 768 of 4 bytes both times.
        ({}, 4 * (STEM + INNER)),
        # The sum reads the block's input and the second convolution's output in float.
        (
            {"stem.0": 8, "down.0": 8, "block.conv1": 8, "block.conv2": 8, "mix.0": 8, "head.2": 8},
            2 * 4 * INNER + INNER,
        ),
        (
            {"stem.0": 4, "down.0": 4, "block.conv1": 4, "block.conv2": 4, "mix.0": 4, "head.2": 4},
            2 * 4 * INNER + INNER // 2,
        ),
        # The moment of the other one stays.
        ({"down.0": 8}, 4 * 3 * INNER),
        ({"block.conv2": 8, "mix.0": 8}, 4 * (STEM + INNER)),
    ],
)
def test_activation_memory_is_what_hands_count(evaluator: Evaluator, inputs: dict[str, int], expected: int) -> None:
    rules = [{"match": name, "input": f"uint{bits} affine mse"} for name, bits in inputs.items()]
    plans = evaluator.layer_plans({"rules": rules or [{"match": "*", "weight": "float"}]})
    assert evaluator.costs(plans)["activation_memory"] == expected


def test_energy_is_what_hands_count(evaluator: Evaluator) -> None:
    macs = {"stem.0": 9 * 8 * 64, "down.0": 72 * 16 * 16, "mix.0": 144 * 16 * 4, "head.2": 160}
    macs |= {"block.conv1": 144 * 16 * 16, "block.conv2": 144 * 16 * 16}
    weights = {"stem.0": 72, "down.0": 72 * 16, "block.conv1": 2304, "block.conv2": 2304, "mix.0": 2304, "head.2": 160}
    plans = evaluator.layer_plans("int2 per_channel mse / uint4 affine mse")
    channels = 8 + 4 * 16 + 10
    # One scale for each channel; two numbers of its batch norm, or the head's bias.
    others = 2 * (channels - 10) + 10
    reads = 2 * sum(weights.values()) + 32 * (channels + others)
    expected = sum(macs.values()) * (0.2 * 2 * 4 / 64 + 0.1) + reads * 1950 / 64
    assert evaluator.costs(plans)["energy"] == pytest.approx(expected * 1e-6)


@pytest.mark.parametrize("cost", [name for name in COSTS if name != "latency"])
def test_the_cheapest_plan_is_the_cheapest_of_all(model: DigitsCNN, cost: str) -> None:
    small = {
        "weight": {"bit_widths": [8, 2], "granularities": ["per_channel", "group8 ragged"], "ranges": ["mse"]},
        "input": ["float", "uint8 affine mse", "uint4 affine mse"],
        "rules": [{"match": "re:stem.*|down.*|head.*", "weight": "int8 per_channel mse", "input": "uint8 affine mse"}],
        "tie": ["block.*"],
    }
    with Evaluator(model, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as made:
        space = made.calibrate(small)
        free = [unit for unit in space.units if len(unit.choices) > 1]
        assert 12 < space.size <= 1000
        all_costs = []
        for chosen in itertools.product(*(unit.choices for unit in free)):
            params = {k: v for unit, c in zip(free, chosen, strict=True) for k, v in unit.params(c).items()}
            all_costs.append(made.costs(space.layer_plans(params))[cost])
        plan = smallest_plan(space, unit_costs(made, cost)[1])
        assert made.costs(space.layer_plans(plan))[cost] == min(all_costs)


@pytest.mark.parametrize("cost", ["bops", "energy", "activation_memory"])
def test_a_bound_below_the_cheapest_plan_is_refused_before_any_trial(model: DigitsCNN, cost: str) -> None:
    space = {
        "weight": {"bit_widths": [8, 2], "granularities": ["per_channel"], "ranges": ["mse"]},
        "input": ["float", "uint8 affine mse", "uint4 affine mse"],
    }
    with Evaluator(model, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as made:
        bound = made.calibrate(space)
        plan = bound.layer_plans(smallest_plan(bound, unit_costs(made, cost)[1]))
        least = made.costs(plan)[cost]
    given: dict[str, Any] = {"calibration_batches": 1, "progress": False, "trainer": CPU, "seeds": 0}
    data = DigitsDataModule(batch_size=120)
    with pytest.raises(QuantizationError, match=f"no plan of the space keeps '{cost} <= .*': the smallest has"):
        search(model, data, space, "val/acc", 1, constraints=f"{cost} <= {0.99 * least}", **given)
    # Just reachable: not refused, and found by the sampler of integer programs.
    result = search(
        model, data, space, "val/acc", 1, constraints=f"{cost} <= {1.5 * least}", cost=cost,
        sampler=SurrogateSampler, **given,
    )  # fmt: skip
    assert result.candidates[0].metrics[cost] <= 1.5 * least


@pytest.mark.parametrize("sampler", [None, SurrogateSampler])
def test_a_search_minimizes_memory_and_energy(model: DigitsCNN, tmp_path: Path, sampler: Any) -> None:
    options: dict[str, Any] = {} if sampler is None else {"sampler": sampler}
    result = run(
        model, 8, cost=["activation_memory", "energy"], constraints="activation_memory <= 3000", output_dir=tmp_path,
        seeds=3, sensitivity_batches=1, **options,
    )  # fmt: skip
    assert result.cost == "activation_memory"
    assert all(c.metrics["activation_memory"] <= 3000 for c in result.candidates)
    assert len({c.metrics["energy"] for c in result.candidates}) > 3
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert all(float(row["activation_memory"]) > 0 and float(row["energy"]) > 0 for row in rows)
    report = ReportData.load(tmp_path / "report.json").study
    assert report is not None
    assert {"activation_memory", "energy", "bops"} <= set(report.costs)


def test_every_cost_has_a_label_and_unknown_ones_are_named(model: DigitsCNN) -> None:
    assert set(LABELS) == set(COSTS)
    with pytest.raises(QuantizationError, match=r"unknown cost 'activation_memry'.*Did you mean 'activation_memory'"):
        SearchConfig(model, None, SPACE, "val/acc", cost="activation_memry")
