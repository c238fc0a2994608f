"""The MSE search against brute force in numpy."""

import numpy as np
import pytest
import torch

from lq_plugin.functional.affine import fake_quantize, qparams_from_bounds
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.native import available, switch as switch_module, use_native
from lq_plugin.native.kernels import Kernels
from lq_plugin.ranges import Histogram, Sample, estimate_range, summarize
from lq_plugin.ranges.estimators.mse import _descending_errors
from lq_plugin.ranges.grid_error import clipped_share, clipping_error, mean_squared_error


def numpy_error(x, scale, zero_point, grid):
    q = np.clip(np.round(x / scale) + zero_point, grid.quant_min, grid.quant_max)
    return ((x - (q - zero_point) * scale) ** 2).mean()


def brute_force(x, grid):
    """Least error of any bounds within the data, on a fine lattice."""
    x = x.astype(np.float64)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    if grid.affine:
        best = np.inf
        for a in np.linspace(0.0, 1.0, 41):
            for b in np.linspace(0.0, 1.0, 41):
                if a * low == b * high == 0.0:
                    continue
                scale = (b * high - a * low) / (grid.levels - 1)
                best = min(best, numpy_error(x, scale, np.round(grid.quant_min - a * low / scale), grid))
        return best
    widest = max(high / grid.quant_max if grid.quant_max else 0.0, low / grid.quant_min if grid.quant_min else 0.0)
    if widest == 0.0:  # no level on the side of the data
        return (x**2).mean()
    return min(numpy_error(x, widest * r, 0.0, grid) for r in np.linspace(0.01, 1.0, 800))


def measured(x, grid, bounds):
    scale, zero_point = qparams_from_bounds(*bounds, grid)
    return (fake_quantize(x, scale.unsqueeze(1), zero_point.unsqueeze(1), grid) - x).double().square().mean(1)


def data(kind, rows, n):
    generator = np.random.default_rng(7)
    x = generator.normal(size=(rows, n))
    if kind == "laplace":
        x = generator.laplace(size=(rows, n))
    elif kind == "outlier":
        x[:, 0] = 80.0
    elif kind == "relu":
        x = np.maximum(x, 0.0)
    elif kind == "skewed":
        x = generator.gamma(2.0, size=(rows, n)) - 0.5
    return torch.tensor(x, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "outlier", "relu", "skewed"])
@pytest.mark.parametrize("spec", ["int1", "int2", "int3 narrow", "int4", "int8", "uint1", "uint4"])
@pytest.mark.parametrize("n", [9, 64, 576])
def test_no_worse_than_brute_force(kind, spec, n):
    grid = QuantSpec.parse(spec).grid
    x = data(kind, 2, n)
    errors = measured(x, grid, estimate_range("mse", Sample.from_tensor(x), grid))
    # Few values on many levels: the error jumps between candidates, a search meets it within percents.
    slack = 1.2 if n < 100 and grid.levels > 100 else 1.03 if n < 100 or grid.levels > 100 else 1.01
    for row in range(2):
        assert errors[row].item() <= brute_force(x[row].numpy(), grid) * slack + 1e-9


@pytest.mark.parametrize("kind", ["gauss", "outlier", "relu", "skewed"])
@pytest.mark.parametrize("spec", ["uint1 affine", "uint2 affine", "int3 affine", "uint4 affine"])
def test_zero_point_no_worse_than_brute_force(kind, spec):
    grid = QuantSpec.parse(spec).grid
    x = data(kind, 2, 400)
    errors = measured(x, grid, estimate_range("mse", Sample.from_tensor(x), grid))
    for row in range(2):
        assert errors[row].item() <= brute_force(x[row].numpy(), grid) * 1.02


@pytest.mark.parametrize("spec", ["int2", "int4", "int8", "uint4", "uint8 affine", "int4 affine"])
@pytest.mark.parametrize("kind", ["gauss", "relu", "outlier"])
def test_found_from_a_histogram_as_good_as_from_the_values(spec, kind):
    grid = QuantSpec.parse(spec).grid
    x = data(kind, 1, 200_000)
    histogram = Histogram(max_samples=None)
    histogram.update(x)
    from_values = measured(x, grid, estimate_range("mse", Sample.from_tensor(x), grid)).item()
    from_bins = measured(x, grid, estimate_range("mse", histogram.sample(), grid)).item()
    assert from_bins <= from_values * 1.01


@pytest.mark.parametrize("spec", ["int2", "int4 narrow", "int8", "uint8 affine", "int12"])
def test_error_of_a_sample_is_that_of_fake_quantize(spec):
    grid = QuantSpec.parse(spec).grid
    x = data("skewed", 3, 100_000)
    x[:, :30_000] = 0.0
    scale = torch.tensor([0.02, 0.3, 1.1]) * 8 / grid.levels
    zero_point = torch.tensor([0.0, 1.0, 2.0]) if grid.affine else torch.zeros(3)
    x̂ = fake_quantize(x, scale.unsqueeze(1), zero_point.unsqueeze(1), grid)
    expected = (x - x̂).double().square().mean(1)
    exact = Sample.from_tensor(x)
    binned = summarize(x, max_points=1000)
    assert binned.values.shape[1] < 3000
    for sample, tolerance in ((exact, 1e-5), (binned, 0.02)):
        got = mean_squared_error(sample, scale.unsqueeze(1), zero_point.unsqueeze(1), grid).squeeze(1)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=0.0)
    q = (x / scale.unsqueeze(1)).round() + zero_point.unsqueeze(1)
    clipped = ((q < grid.quant_min) | (q > grid.quant_max)).double().mean(1)
    torch.testing.assert_close(clipped_share(exact, scale, zero_point, grid), clipped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clipped_share(binned, scale, zero_point, grid), clipped, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "outlier", "relu", "skewed"])
@pytest.mark.parametrize("spec", ["int1", "int2 narrow", "int4", "int8", "uint4"])
def test_scales_that_are_not_looked_at_clip_too_much(kind, spec):
    """Left out or not, every scale of a sweep: by numpy in float64, none is better than the one that is found."""
    grid = QuantSpec.parse(spec).grid
    x = data(kind, 6, 20_000)
    x[4] = 0.0  # no error at any scale
    x = -x.abs() if spec == "int1" else x  # it has levels below zero only
    widest, _ = qparams_from_bounds(x.amin(1), x.amax(1), grid)
    scale = widest.unsqueeze(1) * torch.linspace(0.1, -5.0, 48).exp()
    zero_point = torch.zeros_like(scale)
    error = _descending_errors(
        Sample.from_tensor(x), lambda at: (scale[:, at[0]], zero_point[:, at[0]]), scale.shape[1], grid
    )
    left_out = error.isinf()
    assert torch.equal(left_out[:, 1:], left_out[:, :-1] | left_out[:, 1:])  # from one column on
    assert torch.equal(left_out[0], left_out[5])  # for all rows alike
    if grid.levels >= 16:
        assert left_out.any()
    for row in range(6):
        values = x[row].double().numpy()
        every = [numpy_error(values, step, 0.0, grid) for step in scale[row].double().tolist()]
        assert every[int(error[row].argmin())] <= min(every) * (1 + 1e-5)


@pytest.mark.parametrize("spec", ["int4", "uint4", "uint4 affine"])
def test_clipping_alone_costs_no_more_than_the_grid(spec):
    grid = QuantSpec.parse(spec).grid
    x = data("skewed", 3, 30_000)
    scale, zero_point = torch.tensor([0.05, 0.1, 0.3]), torch.tensor([0.0, 2.0, 5.0]) if grid.affine else torch.zeros(3)
    low, high = ((bound - zero_point) * scale for bound in (grid.quant_min, grid.quant_max))
    values = x.double().numpy()
    expected = ((values - values.clip(low.double().numpy()[:, None], high.double().numpy()[:, None])) ** 2).mean(1)
    assert clipping_error(Sample.from_tensor(x), scale, zero_point, grid).tolist() == pytest.approx(
        expected.tolist(), rel=1e-5
    )
    for sample in (Sample.from_tensor(x), summarize(x, max_points=1000)):
        total = mean_squared_error(sample, scale.unsqueeze(1), zero_point.unsqueeze(1), grid).squeeze(1)
        assert (clipping_error(sample, scale, zero_point, grid) <= total * (1 + 1e-6)).all()


def test_padding_has_no_error():
    x = data("gauss", 4, 16)
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[:, 11:] = False
    grid = IntegerGrid(-2, 1)
    masked = estimate_range("mse", Sample.from_tensor(x.masked_fill(~mask, torch.nan), mask), grid)
    torch.testing.assert_close(masked, estimate_range("mse", Sample.from_tensor(x[:, :11]), grid))


@pytest.mark.parametrize(
    "spec", ["int1", "int2", "int4", "int4 narrow", "int8", "uint1", "uint4", "uint4 affine", "int4 affine"]
)
def test_degenerate_rows(spec):
    grid = QuantSpec.parse(spec).grid
    x = torch.tensor([[0.0, 0.0, 0.0], [2.5, 2.5, 2.5], [-1e-3, -1e-3, -1e-3], [0.0, 0.0, 7.0]])
    bounds = estimate_range("mse", Sample.from_tensor(x), grid)
    assert (bounds[0][0].item(), bounds[1][0].item()) == (0.0, 0.0)
    errors = measured(x, grid, bounds)
    for row in range(4):
        representable = row == 0 or grid.affine or (grid.quant_min < 0 if row == 2 else grid.quant_max > 0)
        if representable:
            assert errors[row].item() <= 1e-12 * x[row].square().amax().item()
    single = estimate_range("mse", Sample.from_tensor(torch.tensor([[-3.0]])), grid)
    if grid.signed or grid.affine:
        assert measured(torch.tensor([[-3.0]]), grid, single).item() < 1e-11


@pytest.mark.parametrize("n", [1, 16, 37, 128, 5000])
@pytest.mark.parametrize(
    "grid", [IntegerGrid(-8, 7), IntegerGrid(0, 15, True), IntegerGrid(0, 3), IntegerGrid(-1, 1)], ids=str
)
def test_errors_by_the_kernels_are_those_of_numpy(n, grid, monkeypatch):
    """In every variant that runs here: squares of float32, summed in float64."""
    if not available():
        pytest.skip("no C++ compiler")
    generator = torch.Generator().manual_seed(n)
    x, scale = torch.randn(5, n, generator=generator), torch.rand(5, 9, generator=generator) * 0.5 + 0.01
    zero_point = torch.full((5, 9), 2.0 if grid.affine else 0.0)
    sample = Sample(x, None, x.amin(1), x.amax(1))
    t = x.numpy()[:, None] * (np.float32(1) / scale.numpy())[:, :, None]
    low, high = (np.float32(bound) - zero_point.numpy()[:, :, None] for bound in (grid.quant_min, grid.quant_max))
    off = np.clip(np.rint(t), low, high) - t
    want = np.square(off).astype(np.float64).mean(2) * np.square(scale.numpy().astype(np.float64))
    for variant in Kernels().variants:
        monkeypatch.setattr(switch_module, "_compiled", lambda variant=variant: Kernels(variant))
        with use_native(True):
            found = mean_squared_error(sample, scale, zero_point, grid)
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)
    with use_native(False):
        np.testing.assert_allclose(mean_squared_error(sample, scale, zero_point, grid).numpy(), want, rtol=1e-12)
