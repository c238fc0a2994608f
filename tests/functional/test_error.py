"""SQNR and clipping share against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lq_plugin.functional.error import clipped_count, clipping_share, energy, sqnr_db
from lq_plugin.metrics import SQNR


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(1e-4, 10.0), size=st.integers(1, 200))
def test_sqnr_is_numpys_and_the_metrics(seed: int, noise: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size).astype(np.float32) + 1
    x_hat = x + (noise * rng.normal(size=size)).astype(np.float32)
    wide, wide_hat = x.astype(np.float64), x_hat.astype(np.float64)
    expected = 10 * np.log10((wide**2).sum() / ((wide - wide_hat) ** 2).sum())
    got = sqnr_db(torch.from_numpy(x), torch.from_numpy(x_hat))
    assert float(got) == pytest.approx(expected, abs=1e-3)
    metric = SQNR()
    metric.update(torch.from_numpy(x_hat), torch.from_numpy(x))
    assert float(got) == pytest.approx(float(metric.compute()), abs=1e-3)


def test_sqnr_at_its_ends() -> None:
    x, zero = torch.ones(3), torch.zeros(3)
    assert float(sqnr_db(x, x)) == math.inf
    assert float(sqnr_db(zero, zero)) == math.inf
    assert float(sqnr_db(zero, x)) == -math.inf
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        sqnr_db(x, torch.ones(2))


def test_energy_does_not_lose_small_squares() -> None:
    x = torch.full((2**20,), 1e-3)
    x[0] = 1e3
    assert float(energy(x)) == pytest.approx(1e6 + (2**20 - 1) * 1e-6, rel=1e-9)


def test_energy_of_half_precision_does_not_overflow() -> None:
    assert float(energy(torch.full((4,), 300.0, dtype=torch.float16))) == 4 * 300.0**2


def test_clipping_share_broadcasts_and_takes_bounds_as_inside() -> None:
    x = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [-2.0, 0.0, 3.0, 4.0]])
    lo, hi = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[1.0], [3.0]])
    assert clipping_share(x, lo, hi) == 2 / 8
    assert int(clipped_count(x, lo, hi)) == 2
    with pytest.raises(ValueError, match="0 elements"):
        clipping_share(torch.ones(0), lo, hi)
