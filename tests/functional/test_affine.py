"""Uniform quantization against torch's own fake-quant kernels (bit for bit) and against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from lq_plugin.functional.affine import bounds_from_qparams, dequantize, fake_quantize, qparams_from_bounds, quantize
from lq_plugin.intent.spec import IntegerGrid

grids = st.one_of(
    st.builds(
        lambda b, narrow, affine: IntegerGrid(-(2 ** (b - 1)) + narrow, 2 ** (b - 1) - 1, affine),
        st.integers(2, 16),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(lambda b, affine: IntegerGrid(0, 2**b - 1, affine), st.integers(1, 16), st.booleans()),
)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=6), elements=st.floats(-100, 100, width=32))


def qparams_for(x: torch.Tensor, grid: IntegerGrid):
    return qparams_from_bounds(x.min(), x.max(), grid)


@given(arrays, grids)
def test_grid_points_are_fixed_points_and_error_is_bounded(array, grid):
    x = torch.from_numpy(array)
    scale, zero_point = qparams_for(x, grid)
    y = fake_quantize(x, scale, zero_point, grid)
    assert y.shape == x.shape
    assert torch.equal(fake_quantize(y, scale, zero_point, grid), y)
    assert torch.equal(dequantize(quantize(x, scale, zero_point, grid), scale, zero_point), y)
    low, high = bounds_from_qparams(scale, zero_point, grid)
    inside = (x >= low) & (x <= high)
    # Half a step, and the rounding of the float32 quotient, which grows with the number of levels.
    tolerance = scale * (0.5 + grid.levels * 2.0**-22)
    assert ((x - y).abs()[inside] <= tolerance).all()
    assert (y >= low).all()
    assert (y <= high).all()


@given(arrays, grids)
def test_monotonic(array, grid):
    x = torch.from_numpy(array).flatten().sort().values
    y = fake_quantize(x, *qparams_for(x, grid), grid)
    assert (y.diff() >= 0).all()


@given(arrays, grids)
def test_zero_is_exact_and_both_bounds_are_reached(array, grid):
    x = torch.from_numpy(array)
    scale, zero_point = qparams_for(x, grid)
    assert fake_quantize(torch.zeros(1), scale, zero_point, grid) == 0
    low, high = bounds_from_qparams(scale, zero_point, grid)
    if grid.affine or grid.signed:
        slack = float(scale) * (0.5001 if grid.affine else 1e-4)
        assert low <= x.min() + slack or x.min() >= 0
        assert high >= x.max() - slack or x.max() <= 0


def numpy_fake_quantize(x, scale, zero_point, low, high):
    """The formula of the docstring, in float64."""
    q = np.clip(np.rint(x.astype(np.float64) / scale) + zero_point, low, high)
    return (q - zero_point) * scale


@given(arrays, grids)
def test_against_numpy(array, grid):
    x = torch.from_numpy(array)
    scale, zero_point = qparams_for(x, grid)
    want = numpy_fake_quantize(array, float(scale), float(zero_point), grid.quant_min, grid.quant_max)
    got = fake_quantize(x, scale, zero_point, grid).numpy()
    ratio = np.abs(array.astype(np.float64) / float(scale))
    tie = np.abs(ratio % 1 - 0.5) < 1e-5 * np.maximum(ratio, 1)  # float32 may fall on the other side of a tie
    np.testing.assert_allclose(got[~tie], want[~tie], rtol=1e-5, atol=1e-30)


NATIVE = [(-128, 127), (-127, 127), (0, 255), (-8, 7), (0, 15), (-2, 1), (0, 1)]


@pytest.mark.parametrize(("low", "high"), NATIVE)
@pytest.mark.parametrize("affine", [False, True])
def test_per_tensor_equals_torch_bit_for_bit(low, high, affine):
    torch.manual_seed(low + high)
    grid = IntegerGrid(low, high, affine)
    x = torch.randn(64, 33) * 3 + 0.5
    scale, zero_point = qparams_from_bounds(torch.tensor(-2.0), torch.tensor(3.0), grid)
    scale = 2.0 ** scale.log2().floor()  # halves of a power of two are exact: real ties
    x.view(-1)[:1100] = (torch.arange(1100) - 550) * scale / 2
    mine, native = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = fake_quantize(mine, scale, zero_point, grid)
    want = torch.fake_quantize_per_tensor_affine(native, scale, zero_point.to(torch.int32), low, high)
    assert torch.equal(y, want)
    upstream = torch.randn_like(x)
    y.backward(upstream)
    want.backward(upstream)
    assert torch.equal(mine.grad, native.grad)
    assert (mine.grad == 0).any()
    assert (mine.grad != 0).any()


@pytest.mark.parametrize(("low", "high"), NATIVE)
@pytest.mark.parametrize("affine", [False, True])
def test_per_channel_equals_torch_bit_for_bit(low, high, affine):
    torch.manual_seed(low + high)
    grid = IntegerGrid(low, high, affine)
    x = torch.randn(5, 7, 3, 3) * torch.tensor([0.01, 1.0, 30.0, 1e-4, 2.0]).view(5, 1, 1, 1)
    flat = x.reshape(5, -1)
    scale, zero_point = qparams_from_bounds(flat.quantile(0.05, dim=1), flat.quantile(0.95, dim=1), grid)
    mine, native = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = fake_quantize(mine, scale.view(5, 1, 1, 1), zero_point.view(5, 1, 1, 1), grid)
    want = torch.fake_quantize_per_channel_affine(native, scale, zero_point.to(torch.int32), 0, low, high)
    assert torch.equal(y, want)
    upstream = torch.randn_like(x)
    y.backward(upstream)
    want.backward(upstream)
    assert torch.equal(mine.grad, native.grad)


def test_straight_through_gradient_is_the_slope_of_the_clipped_identity():
    """Away from the clipping points, finite differences of clip(x) are the gradient the STE promises."""
    grid = IntegerGrid(-8, 7)
    scale, zero_point = torch.tensor(0.1), torch.tensor(0.0)
    x = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    low, high = (float(b) for b in bounds_from_qparams(scale, zero_point, grid))
    # The edge levels reach half a step beyond the last grid point.
    x = x[((x - low + 0.05).abs() > 1e-2) & ((x - high - 0.05).abs() > 1e-2)].requires_grad_()
    fake_quantize(x, scale, zero_point, grid).sum().backward()
    eps = 1e-4
    clip = lambda v: v.clamp(low - 0.05, high + 0.05)  # noqa: E731
    slope = (clip(x.detach() + eps) - clip(x.detach() - eps)) / (2 * eps)
    torch.testing.assert_close(x.grad, slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_float32_whatever_the_dtype(dtype):
    grid = IntegerGrid(-128, 127)
    x = torch.randn(100).to(dtype)
    scale, zero_point = qparams_from_bounds(x.float().min(), x.float().max(), grid)
    y = fake_quantize(x, scale, zero_point, grid)
    assert y.dtype == dtype
    assert torch.equal(y, fake_quantize(x.float(), scale, zero_point, grid).to(dtype))
    assert scale.dtype == torch.float32


def test_degenerate_bounds():
    for grid in (IntegerGrid(-8, 7), IntegerGrid(0, 15), IntegerGrid(0, 15, affine=True)):
        scale, zero_point = qparams_from_bounds(torch.zeros(3), torch.zeros(3), grid)
        assert (scale > 0).all()
        assert torch.isfinite(1 / scale).all()
        assert torch.equal(fake_quantize(torch.zeros(3), scale, zero_point, grid), torch.zeros(3))
    huge = torch.finfo(torch.float32).max
    scale, _ = qparams_from_bounds(torch.tensor(-huge), torch.tensor(huge), IntegerGrid(0, 255, affine=True))
    assert torch.isfinite(scale)


def test_full_range_uses_the_most_negative_level():
    """A signed full grid reaches -8 with the scale that 7 needs, and no larger one."""
    scale, _ = qparams_from_bounds(torch.tensor(-8.0), torch.tensor(7.0), IntegerGrid(-8, 7))
    assert scale == 1.0
    scale, _ = qparams_from_bounds(torch.tensor(-8.0), torch.tensor(7.0), IntegerGrid(-7, 7))
    assert scale == torch.tensor(8.0) / 7
