"""OCTAV against the sequence and the optima of the reference."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.ranges import Sample, estimate_range
from lq_plugin.ranges.estimators.octav import newton_iterates
from lq_plugin.ranges.magnitudes import fold


def quantiles(distribution, n=400_000):
    """A sample without noise: evenly spaced quantiles."""
    return torch.tensor(distribution.ppf((np.arange(n) + 0.5) / n), dtype=torch.float32).unsqueeze(0)


def exact(x):
    return Sample.from_tensor(x)


def fixed_point(hinge, inside_noise, lowest=0.5, highest=15.0):
    """Root of s = E[x; x > s] / (noise P(x <= s) + P(x > s)) on the positive side, by scipy."""
    return scipy.optimize.brentq(lambda s: hinge(s) / inside_noise(s) - s, lowest, highest)


def normal_optimum(bits, noise):
    k, tail = 4.0**-bits / noise, scipy.stats.norm.sf
    return fixed_point(scipy.stats.norm.pdf, lambda s: k * (0.5 - tail(s)) + tail(s))


def laplace_optimum(bits, noise):
    k = 4.0**-bits / noise
    return fixed_point(lambda s: (s + 1) * np.exp(-s), lambda s: k * (1 - np.exp(-s)) + np.exp(-s))


def test_newton_sequence_of_the_paper():
    steps = [s.item() for s in newton_iterates(fold(exact(quantiles(scipy.stats.norm)), IntegerGrid(-7, 7)))]
    assert steps[0] == pytest.approx(np.sqrt(2 / np.pi), abs=1e-4)  # the mean of |x|
    assert steps[1:7] == pytest.approx([1.363, 1.812, 2.171, 2.424, 2.542, 2.563], abs=2.5e-3)
    # The published iterates come from random draws; these are integrals.
    assert steps[1:7] == pytest.approx([1.36336, 1.81197, 2.17022, 2.42278, 2.54102, 2.56171], abs=2e-4)
    assert len(steps) <= 10


@pytest.mark.parametrize(
    ("bits", "normal", "laplace", "relu"),
    [(2, 1.739, 2.871, 2.162), (3, 2.162, 3.910, 2.565), (4, 2.564, 5.032, 2.945), (8, 3.926, 9.79, 4.219)],
)
def test_optima(bits, normal, laplace, relu):
    signed, unsigned = IntegerGrid(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1), IntegerGrid(0, 2**bits - 1)
    for grid, x, published, expected in (
        (signed, quantiles(scipy.stats.norm), normal, normal_optimum(bits, 3)),
        (signed, quantiles(scipy.stats.laplace), laplace, laplace_optimum(bits, 3)),
        (unsigned, quantiles(scipy.stats.norm).relu(), relu, normal_optimum(bits, 12)),
    ):
        got = estimate_range("octav", exact(x), grid)[1].item()
        assert got == pytest.approx(published, rel=0.005 if bits < 8 else 0.015)
        # 8 bits reach so far into the tail that even quantiles are few there.
        assert got == pytest.approx(expected, rel=2e-4 if bits < 8 else 5e-3)


def test_histogram_and_values_agree():
    x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    for grid in (IntegerGrid(-8, 7), IntegerGrid(0, 15, affine=True)):
        for a, b in zip(
            estimate_range("octav", exact(x), grid), estimate_range("octav", Sample.from_tensor(x), grid), strict=True
        ):
            assert a.item() == pytest.approx(b.item(), rel=2e-3)


def test_two_bounds_minimise_the_model_they_are_derived_from():
    """J(l, h) = (h - l)^2 / (12 * 4^b) P(l <= x <= h) + E[(x - clip(x))^2], skewed data."""
    x = torch.tensor(scipy.stats.gamma(2.0).ppf((np.arange(50_000) + 0.5) / 50_000) - 1.0).unsqueeze(0).float()
    low, high = (v.item() for v in estimate_range("octav", exact(x), IntegerGrid(0, 15, affine=True)))
    values = x.double().numpy()

    def objective(a, b):
        inside = ((values >= a) & (values <= b)).mean()
        return (b - a) ** 2 / (12 * 4**4) * inside + ((values - values.clip(a, b)) ** 2).mean()

    best = min(objective(a, b) for a in np.linspace(-1, 0, 41) for b in np.linspace(2, 8, 121))
    assert objective(low, high) <= best * 1.01


def test_symmetric_rows_reduce_to_the_paper():
    x = quantiles(scipy.stats.norm)
    low, high = estimate_range("octav", exact(x), IntegerGrid(0, 15, affine=True))
    assert high.item() == pytest.approx(2.5621, abs=1e-3)
    assert low.item() == pytest.approx(-2.5621, abs=1e-3)


def test_pruned_weights_are_judged_by_what_is_left():
    x = quantiles(scipy.stats.norm, 20_000)
    pruned = torch.cat([x, torch.zeros(1, 180_000)], dim=1)
    grid = IntegerGrid(-7, 7)
    assert estimate_range("octav", exact(pruned), grid)[1].item() == pytest.approx(
        estimate_range("octav", exact(x), grid)[1].item(), rel=1e-5
    )


def test_outlier_does_not_move_it_far():
    x = quantiles(scipy.stats.norm, 100_000)
    x[0, 5] = 80.0
    assert 2.5 < estimate_range("octav", exact(x), IntegerGrid(-7, 7))[1].item() < 4.0


def numpy_octav(y, mass, noise):
    """The iteration of the paper, one value at a time, in float64."""
    y, mass = y[y > 0], mass[y > 0]
    s = np.average(y, weights=mass)
    for _ in range(100):
        outside = y > s
        if not mass[outside].sum():
            break
        s = (mass * y)[outside].sum() / (noise * mass[~outside].sum() + mass[outside].sum())
    return s


@pytest.mark.parametrize("kind", ["norm", "laplace", "outlier", "pruned"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [16, 576, 4608])
def test_same_fixed_point_as_the_plain_iteration(kind, masked, n):
    generator = np.random.default_rng(n)
    x = (generator.laplace if kind == "laplace" else generator.normal)(size=(3, n)).astype(np.float32)
    if kind == "outlier":
        x[:, 0] = 80.0
    elif kind == "pruned":
        x[generator.random(x.shape) < 0.5] = 0.0
    mask = generator.random(x.shape) < (0.8 if masked else 2.0)
    sample = Sample.from_tensor(torch.tensor(x), torch.tensor(mask) if masked else None)
    for grid, folded, noise in (
        (IntegerGrid(-8, 7), np.abs(x), 4.0**-4 / 3),
        (IntegerGrid(0, 15), np.maximum(x, 0.0), 4.0**-4 / 12),
    ):
        low, high = estimate_range("octav", sample, grid)
        got = (-low if grid.signed else high).tolist()
        expected = [
            min(numpy_octav(y.astype(float), m.astype(float), noise), y[m].max())
            for y, m in zip(folded, mask, strict=True)
        ]
        assert got == pytest.approx(expected, rel=1e-5)
