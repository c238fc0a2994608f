"""Sorted rows against numpy, which looks at every value each time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lq_plugin.ranges.ordered import Ordered, ascending

VALUES = st.floats(-4, 4, width=16)  # few distinct ones: thresholds meet values


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(VALUES, min_size=7, max_size=7), min_size=1, max_size=4),
    mass=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=7, max_size=7),
    threshold=st.one_of(VALUES, st.sampled_from([-5.0, 0.0, 5.0])),
    weighted=st.booleans(),
)
def test_mass_and_sum_beyond_a_threshold(rows, mass, threshold, weighted):
    x, weights = np.array(rows), np.array(mass if weighted else [1.0] * 7)
    x[:, 1] = threshold if abs(threshold) <= 4 else x[:, 0]
    ordered = Ordered(torch.tensor(x).float(), torch.tensor(weights).float().expand(len(x), -1) if weighted else None)
    at = torch.full((len(x),), threshold)
    for got, beyond in ((ordered.above(at), x > threshold), (ordered.below(at), x < threshold)):
        assert got[0].dtype == got[1].dtype == torch.float64
        assert got[0].tolist() == pytest.approx((beyond * weights).sum(1).tolist(), abs=1e-12)
        assert got[1].tolist() == pytest.approx((beyond * weights * x).sum(1).tolist(), abs=1e-12)


def test_nothing_beyond_the_extremes_is_exactly_nothing():
    """Fractions of elements, as a strided histogram has them, leave no rounding behind."""
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    ordered = Ordered(x, torch.full_like(x, 0.1))
    assert [v.tolist() for v in ordered.above(x.amax(1))] == [[0.0] * 3] * 2
    assert [v.tolist() for v in ordered.below(x.amin(1))] == [[0.0] * 3] * 2


@pytest.mark.parametrize("shape", [(1, 1), (5, 4608), (300, 3)])
def test_ascending_leaves_its_argument_alone(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for view in (x, x.t().contiguous().t()[:, ::2], x[:1].expand(3, -1)):
        before = view.clone()
        ordered = ascending(view)
        assert np.array_equal(ordered.numpy(), np.sort(before.numpy(), axis=1))
        assert torch.equal(view, before)
