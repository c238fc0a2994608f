"""AdaRound's formulas against numpy."""

import numpy as np
import torch
from hypothesis import given, strategies as st

from lq_plugin.functional.adaround import beta_at, inverse_rectified_sigmoid, neighbours, rectified_sigmoid, regularizer
from lq_plugin.functional.affine import quantize
from lq_plugin.intent.spec import IntegerGrid


@given(st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=20))
def test_rectified_sigmoid(values):
    v = np.array(values, np.float64)
    want = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
    np.testing.assert_allclose(rectified_sigmoid(torch.tensor(values)), want, atol=1e-6)


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30),
    st.sampled_from([(-4, 3, 0.0), (0, 7, 3.0), (-2, 1, 0.0)]),
)
def test_soft_weights_start_as_the_weights_and_end_on_a_neighbour(values, levels):
    low_level, high_level, zero = levels
    grid, scale = IntegerGrid(low_level, high_level, affine=bool(zero)), torch.tensor(0.5)
    w, zero_point = torch.tensor(values), torch.tensor(zero)
    low, high, fraction = neighbours(w, scale, zero_point, grid)
    h = rectified_sigmoid(inverse_rectified_sigmoid(fraction))
    soft = scale * (low + (high - low) * h)
    inside = (w / scale + zero >= low_level) & (w / scale + zero <= high_level)
    np.testing.assert_allclose(soft[inside], w[inside], atol=2e-6)
    # Nearest rounding is one of the two, so learned rounding can always do as well.
    nearest = quantize(w, scale, zero_point, grid) - zero
    assert ((nearest == low) | (nearest == high)).all()
    assert ((high - low) <= 1).all()


def test_regularizer_and_its_annealing():
    h = torch.tensor([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(regularizer(h, 4.0), 1 - np.abs(2 * h.numpy() - 1) ** 4, rtol=1e-6)
    betas = [beta_at(p / 10) for p in range(11)]
    assert betas[0] == 20
    assert betas[-1] == 2
    assert betas == sorted(betas, reverse=True)
