"""Proposals between the neighbours of a front, against enumeration by hand on a space of four layers."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from lq_plugin.intent.spec import QuantSpec
from lq_plugin.search.space.model_space import ModelSpace, Unit
from lq_plugin.search.study import refine
from lq_plugin.search.study.refine import Point, Refiner, front_of

BITS = (2, 3, 4, 8)
CHOICES = tuple(QuantSpec.parse(f"int{bits} per_channel mse") for bits in BITS)
UNITS = tuple(Unit(f"layer{index}.weight", "weight", (f"layer{index}",), CHOICES) for index in range(4))
SPACE = ModelSpace(UNITS, ())
#: Layers differ in size and in how much they suffer from few bits.
SIZES, HARMS = (1.0, 2.0, 4.0, 8.0), (8.0, 1.0, 3.0, 0.5)
COSTS = {
    unit.name: {str(c): size * (c.bit_width - 2) for c in CHOICES} for unit, size in zip(UNITS, SIZES, strict=True)
}
SENSITIVITY = {
    unit.name: {str(c): harm * 4.0**-c.bit_width for c in CHOICES} for unit, harm in zip(UNITS, HARMS, strict=True)
}
BASE = 2 * sum(SIZES)


def point(bits: tuple[int, ...]) -> Point:
    """Returns the score of a plan where the additive model is right."""
    harm = sum(h * 4.0**-b for h, b in zip(HARMS, bits, strict=True))
    return Point(1.0 - harm, sum(s * b for s, b in zip(SIZES, bits, strict=True)), params_of(bits))


def params_of(bits: tuple[int, ...]) -> dict[str, object]:
    return {f"{unit.name}.bits": b for unit, b in zip(UNITS, bits, strict=True)}


def bits_of(params: dict[str, object]) -> tuple[int, ...]:
    return tuple(int(params[f"{unit.name}.bits"]) for unit in UNITS)  # type: ignore[call-overload]


def key(params: object) -> frozenset[tuple[str, object]]:
    return frozenset(dict(params).items())  # type: ignore[call-overload]


def area(points: list[Point]) -> float:
    """Between the front and the corner of the worst metric and the largest cost."""
    worst, most = point((2,) * 4).metric, point((8,) * 4).cost
    found, best = 0.0, worst
    for p in sorted(points, key=lambda p: (p.cost, -p.metric)):
        if p.metric > best:
            found, best = found + (p.metric - best) * (most - p.cost), p.metric
    return found


def test_the_first_proposal_wins_most_of_all_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "GREED", 1.0)
    low, high = point((2, 2, 2, 2)), point((8, 8, 8, 8))
    refiner = Refiner(SPACE, SENSITIVITY, BASE, COSTS)
    taken = {key(low.params), key(high.params)}
    proposed = refiner.propose([low, high], taken)
    assert proposed is not None
    # One or two layers differ from one of the two; the model is exact, so what it expects is what is won.
    neighbours = [
        bits for bits in product(BITS, repeat=4) if any(1 <= sum(b != end for b in bits) <= 2 for end in (2, 8))
    ]
    won = {bits: area([low, high, point(bits)]) - area([low, high]) for bits in neighbours}
    assert won[bits_of(proposed)] == pytest.approx(max(won.values()))


@pytest.mark.parametrize("seed", range(3))
def test_the_front_fills_faster_than_at_random(seed: int) -> None:
    points = [point((b,) * 4) for b in BITS]
    refiner = Refiner(SPACE, SENSITIVITY, BASE, COSTS, seed=seed)
    taken = {key(p.params) for p in points}
    while (proposed := refiner.propose(points, taken)) is not None and len(points) < 24:
        assert key(proposed) not in taken
        new = point(bits_of(proposed))
        front = front_of(points)
        assert any(low.cost <= new.cost < high.cost for low, high in pairwise(front))
        points.append(new)
        taken.add(key(proposed))
    everything = [point(bits) for bits in product(BITS, repeat=4)]
    rng = np.random.default_rng(seed)
    drawn = [everything[i] for i in rng.choice(len(everything), 20, replace=False)]
    assert len(points) > 8
    assert area(points) > 0.97 * area(everything)
    assert area(points) > area(drawn + points[:4])


def test_measured_failures_lead_elsewhere() -> None:
    """The model praises layer 0 at 2 bits; measured, every plan with it is worthless."""
    wrong = SENSITIVITY | {"layer0.weight": {str(c): 0.0 for c in CHOICES}}

    def measured(bits: tuple[int, ...]) -> Point:
        return point(bits) if bits[0] > 2 else point(bits)._replace(metric=0.0)

    points = [measured((b,) * 4) for b in BITS]
    refiner = Refiner(SPACE, wrong, BASE, COSTS, seed=1)
    taken = {key(p.params) for p in points}
    while (proposed := refiner.propose(points, taken)) is not None and len(points) < 44:
        points.append(measured(bits_of(proposed)))
        taken.add(key(proposed))
    everything = [measured(bits) for bits in product(BITS, repeat=4)]
    assert area(points) > 0.9 * area(everything)


def test_a_bound_is_kept_and_nothing_left_is_nothing() -> None:
    points = [point((2,) * 4), point((8,) * 4)]
    refiner = Refiner(SPACE, SENSITIVITY, BASE, COSTS, most=45.0)
    taken = {key(p.params) for p in points}
    while (proposed := refiner.propose(points, taken)) is not None:
        assert point(bits_of(proposed)).cost <= 45.0
        taken.add(key(proposed))
    assert len(taken) > 10
    assert Refiner(SPACE, SENSITIVITY, BASE, COSTS).propose(points[:1], set()) is None
