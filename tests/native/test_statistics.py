"""Compiled counting and searching against numpy and against the torch operations they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from lq_plugin.native import available, use_native
from lq_plugin.native.statistics import StatisticsKernels, statistics_kernels
from lq_plugin.ranges import Histogram
from lq_plugin.ranges.estimators.kl import best_bin

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)

finite = st.one_of(st.floats(-40, 40, width=32), st.sampled_from([0.0, -0.0, 1e-40, -1e-42, 3e38, -3e38, 1e-30]))


@settings(max_examples=50, deadline=None)
@given(x=hnp.arrays(np.float32, st.integers(1, 40), elements=finite), lowest=st.sampled_from([0, 14208, 15744]))
def test_bins_are_the_upper_halves_of_the_bits(x: np.ndarray, lowest: int) -> None:
    bins = 2048 if lowest else 2**15
    counts = torch.full((2, bins), 3, dtype=torch.int64)
    zeros = StatisticsKernels().count_bins(torch.from_numpy(x), counts, lowest)
    expected = np.full((2, bins), 3)
    half = (np.abs(x).view(np.uint32) >> 16).astype(int)
    for value, of in zip(half, np.signbit(x), strict=True):
        if value:
            expected[0 if of else 1, np.clip(value - lowest, 0, bins - 1)] += 1
    assert zeros == (half == 0).sum()
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("n", [3, 1000, 70_001, 600_003])
def test_a_histogram_is_the_same_without_kernels(n: int) -> None:
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(n))
    x[0, : n // 3] = torch.tensor([0.0, -0.0, 1e-40]).repeat(n // 9 + 1)[: n // 3]
    states = []
    for on in (True, False):
        with use_native(on):
            histogram = Histogram(max_samples=None)
            for scale in (1.0, 40.0, 1e-20):
                histogram.update(x * scale)
            states.append(histogram.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@settings(max_examples=50, deadline=None)
@given(
    counts=hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(8, 60)), elements=st.integers(0, 9)),
    beyond=st.sampled_from([0.0, 2.0, 50.0]),
    levels=st.sampled_from([1, 2, 3, 8]),
)
def test_the_search_is_the_same_without_kernels(counts: np.ndarray, beyond: float, levels: int) -> None:
    rows = torch.from_numpy(counts)
    rows[:, 0] += 1
    found = []
    for on in (True, False):
        with use_native(on):
            found.append(best_bin(rows, torch.full((len(rows),), beyond, dtype=torch.float64), levels).tolist())
    assert found[0] == found[1]


def test_kernels_keep_away_from_what_they_cannot_read() -> None:
    with use_native(True):
        assert statistics_kernels(torch.zeros(3)) is not None
        assert statistics_kernels(torch.zeros(3, device="meta")) is None
        assert statistics_kernels(torch.zeros(3).as_subclass(type("Mine", (torch.Tensor,), {}))) is None
    with use_native(False):
        assert statistics_kernels(torch.zeros(3)) is None
