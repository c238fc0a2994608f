"""Stochastic rounding and the MAD gradient against their formulas."""

import numpy as np
import torch
from hypothesis import given, strategies as st

from lq_plugin.functional.affine import fake_quantize, fake_quantize_identity
from lq_plugin.functional.mad import fake_quantize_mad
from lq_plugin.functional.stochastic import fake_quantize_stochastic
from lq_plugin.intent.spec import IntegerGrid

GRID = IntegerGrid(-8, 7)
AFFINE = IntegerGrid(0, 15, affine=True)
ZERO = torch.tensor(0.0)


def test_the_mean_of_stochastic_rounding_is_the_value():
    generator = torch.Generator().manual_seed(0)
    for value in (0.3, -1.75, 2.0):
        x = torch.full((100_000,), value)
        y = fake_quantize_stochastic(x, torch.tensor(0.5), ZERO, GRID, torch.rand(x.shape, generator=generator))
        # Five standard deviations of the mean of a rounding by at most half of a step of 0.5.
        assert abs(y.mean().item() - value) < 5 * 0.25 / len(x) ** 0.5 + 1e-6
        assert set((y / 0.5).tolist()) <= {np.floor(value / 0.5), np.ceil(value / 0.5)}


@given(st.floats(-6, 6, width=32), st.floats(0, 0.96875, width=32), st.sampled_from([0.0, 5.0]))
def test_stochastic_rounding_is_the_formula(value, u, zero):
    grid = AFFINE if zero else GRID
    x = torch.tensor([value], requires_grad=True)
    y = fake_quantize_stochastic(x, torch.tensor(0.25), torch.tensor(zero), grid, torch.tensor([u]))
    # In float32, as the function computes: the sum x / s + u may round up to the next whole number.
    q = np.clip(
        np.floor(np.float32(np.float32(value) * np.float32(4)) + np.float32(u)) + zero, grid.quant_min, grid.quant_max
    )
    assert y.item() == (q - zero) * 0.25
    y.backward()
    assert x.grad.item() == (grid.quant_min <= value * 4 + zero <= grid.quant_max)


def test_grid_points_stay_whatever_is_drawn():
    x = torch.arange(-8, 8) * 0.125
    for u in (0.0, 0.5, 0.99):
        assert torch.equal(fake_quantize_stochastic(x, torch.tensor(0.125), ZERO, GRID, torch.full((16,), u)), x)


@given(st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=20), st.booleans())
def test_mad_gradient_is_the_formula(values, affine):
    grid, zero = (AFFINE, 5.0) if affine else (GRID, 0.0)
    x = torch.tensor(values, requires_grad=True)
    y = fake_quantize_mad(x, torch.tensor(0.5), torch.tensor(zero), grid)
    assert torch.equal(y, fake_quantize(x, torch.tensor(0.5), torch.tensor(zero), grid))
    y.sum().backward()
    low, high = (grid.quant_min - zero) * 0.5, (grid.quant_max - zero) * 0.5
    want = [high / v if v > high else low / v if v < low else 1.0 for v in values]
    np.testing.assert_allclose(x.grad, want, rtol=1e-6)


@given(st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=20))
def test_the_identity_gradient_passes_everywhere(values):
    x = torch.tensor(values, requires_grad=True)
    y = fake_quantize_identity(x, torch.tensor(0.5), ZERO, GRID)
    assert torch.equal(y, fake_quantize(x, torch.tensor(0.5), ZERO, GRID))
    weights = torch.arange(1.0, len(values) + 1)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)
