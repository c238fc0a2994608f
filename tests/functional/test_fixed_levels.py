"""Levels under fixed scales against brute force, and against torch's own casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lq_plugin.functional.fixed_levels import TableLevels
from lq_plugin.functional.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    INT8,
    Minifloat,
    round_to_minifloat,
    signed_values,
)

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
TABLES = {
    "e2m1": [-v for v in reversed(E2M1_VALUES[1:])] + E2M1_VALUES,
    "seq": [-1.5, -0.5, 0.5, 1.5],
    "ternary": [-1.0, 0.0, 1.0],
}


def levels(table: list[float] | Tensor, step: float = 1.0) -> TableLevels:
    return TableLevels(torch.tensor(step), torch.tensor(0.0), False, torch.as_tensor(table))


@pytest.mark.parametrize("step", [1.0, 0.25, 0.3])
@pytest.mark.parametrize("table", TABLES)
def test_neighbours_and_the_nearest_by_brute_force(table: str, step: float) -> None:
    values = np.array(TABLES[table])
    w = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1.5 * step * values.max()
    low, high, place = levels(TABLES[table], step).neighbours(w)
    nearest = levels(TABLES[table], step).nearest(w)
    for x, below, above, share, rounded in zip(w, low, high, place, nearest, strict=True):
        ratio = float(x) / float(np.float32(step))
        want_low = max((v for v in values if v <= ratio), default=values[0])
        want_high = min((v for v in values if v > ratio), default=values[-1])
        assert (float(below), float(above)) == (want_low, want_high)
        if want_low < want_high:
            assert float(share) == pytest.approx((ratio - want_low) / (want_high - want_low), abs=1e-5)
        best = values[np.abs(values - ratio).argmin()]
        assert float(rounded) == pytest.approx(best * step, rel=1e-6)


@pytest.mark.parametrize(
    ("fmt", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_the_nearest_float8_is_that_of_torchs_cast_also_halfway(fmt: Minifloat, dtype: torch.dtype) -> None:
    table = signed_values(fmt)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    assert set(table.tolist()) == set(every[every.isfinite()].tolist())
    halfway = (table[1:] + table[:-1]) / 2
    x = torch.cat([table, halfway, torch.randn(1000, generator=torch.Generator().manual_seed(0)) * fmt.max_value / 4])
    x = x.clamp(-fmt.max_value, fmt.max_value)
    assert torch.equal(levels(table).nearest(x), x.to(dtype).float())


@pytest.mark.parametrize("fmt", [E2M1, E2M3, E3M2, E4M3, E5M2, INT8], ids=lambda fmt: f"{fmt.bit_width} bits")
def test_halfway_is_half_to_even_of_every_small_float(fmt: Minifloat) -> None:
    table = signed_values(fmt)
    assert (table[1:] > table[:-1]).all()
    halfway = (table[1:] + table[:-1]) / 2
    assert torch.equal(levels(table).nearest(halfway), round_to_minifloat(halfway, fmt))


def test_scales_are_laid_out_with_the_weights() -> None:
    scale = torch.tensor([[1.0], [2.0]])
    two = TableLevels(scale, torch.zeros(2, 1), False, torch.tensor(TABLES["e2m1"]))
    assert two.nearest(torch.tensor([[5.5, 0.9], [5.5, 0.9]])).tolist() == [[6.0, 1.0], [6.0, 1.0]]
    turned = two.mapped(lambda t: t.mT)
    assert turned.nearest(torch.tensor([[5.5, 9.5], [0.9, 0.4]])).tolist() == [[6.0, 8.0], [1.0, 0.0]]
