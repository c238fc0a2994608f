"""The analytic ranges against the authors' numbers, numeric integration and the sample itself."""

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from lq_plugin.errors import SpecError
from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.ranges import Sample, estimate_range
from lq_plugin.ranges.distributions import DISTRIBUTIONS, expected_error, fit_distributions
from lq_plugin.ranges.estimators.aciq import aciq_threshold, exact_scale

PAPER = {
    "laplace": [1.8628, 2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968, 11.1627],
    "gauss": [1.2399, 1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240, 4.2163],
}
NARROW = {
    "laplace": [2.0000, 3.4864, 4.8199, 6.0980, 7.3586, 8.6178, 9.8827],
    "gauss": [1.2240, 1.9523, 2.4739, 2.8987, 3.2701, 3.6075, 3.9205],
}
FULL = {
    "laplace": [2.0000, 3.4341, 4.3131, 5.2908, 6.3646, 7.5085, 8.7016, 9.9291],
    "gauss": [1.2240, 2.0968, 2.4073, 2.7089, 3.0207, 3.3337, 3.6408, 3.9380],
}
SCIPY = {
    ("gauss", False): scipy.stats.norm(),
    ("laplace", False): scipy.stats.laplace(),
    ("gauss", True): scipy.stats.halfnorm(),
    ("laplace", True): scipy.stats.expon(),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_constants_of_the_paper(name):
    assert [aciq_threshold(name, bits) for bits in range(1, 10)] == pytest.approx(PAPER[name], abs=5.1e-5)


def test_all_digits_of_the_authors_code():
    assert [aciq_threshold("laplace", bits) for bits in (2, 3, 4)] == pytest.approx(
        [2.83068299, 3.89722946, 5.02864014], abs=5e-9
    )
    assert [aciq_threshold("gauss", bits) for bits in (2, 3)] == pytest.approx([1.71063519, 2.15159277], abs=1e-6)


def test_laplace_is_lambert_w():
    expected = [scipy.special.lambertw(3 * 4.0**bits).real for bits in range(1, 17)]
    assert [aciq_threshold("laplace", bits) for bits in range(1, 17)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_threshold_is_the_minimum_of_the_papers_error(name, bits):
    density = SCIPY[name, False].pdf

    def error(alpha):
        clipping = 2 * scipy.integrate.quad(lambda x: (x - alpha) ** 2 * density(x), alpha, 60, epsabs=1e-14)[0]
        return clipping + alpha**2 / (3 * 4**bits)

    best = aciq_threshold(name, bits)
    assert error(best) <= min(error(best * f) for f in (0.99, 1.01))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_optimum_of_the_real_grid(name):
    narrow = [(2 ** (b - 1) - 1) * exact_scale(name, 1 - 2 ** (b - 1), 2 ** (b - 1) - 1) for b in range(2, 9)]
    full = [2 ** (b - 1) * exact_scale(name, -(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in range(1, 9)]
    # One unit in the last digit: the table is rounded from a search of its own.
    assert narrow == pytest.approx(NARROW[name], abs=1.01e-4)
    assert full == pytest.approx(FULL[name], abs=1.01e-4)


@pytest.mark.parametrize(("name", "one_sided"), list(SCIPY))
@pytest.mark.parametrize(
    ("quant_min", "quant_max", "scale"), [(-2, 1, 1.1), (-7, 7, 0.37), (0, 15, 0.2), (-1, 0, 1.5), (3, 9, 0.4)]
)
def test_closed_form_error_equals_integration(name, one_sided, quant_min, quant_max, scale):
    density = SCIPY[name, one_sided].pdf
    levels = np.arange(quant_min, quant_max + 1) * scale
    cells = np.concatenate([[-50.0], (levels[1:] + levels[:-1]) / 2, [50.0]])
    expected = 0.0
    for level, low, high in zip(levels, cells[:-1], cells[1:], strict=True):
        breaks = [
            b for b in (low, *np.arange(-30.0, 31.0, 1.0), high) if low <= b <= high and not (one_sided and b < 0)
        ]
        for a, b in itertools.pairwise(breaks):
            expected += scipy.integrate.quad(lambda x, q=level: (x - q) ** 2 * density(x), a, b, epsabs=1e-12)[0]
    got = expected_error(
        name, *torch.tensor([[scale], [quant_max * scale]], dtype=torch.float64), len(levels), one_sided
    )
    assert got.item() == pytest.approx(expected, rel=1e-7)


def draw(name, n=200_000, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n) if name == "gauss" else generator.laplace(size=n)
    return torch.tensor(x, dtype=torch.float32).unsqueeze(0)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("scaled", [1.0, 0.01])
def test_bounds_from_data(name, scaled):
    x = draw(name) * scaled
    low, high = estimate_range(f"aciq:{name}", Sample.from_tensor(x), IntegerGrid(-7, 7))
    assert high.item() == pytest.approx(PAPER[name][3] * scaled, rel=0.01)
    assert low.item() == -high.item()
    low, high = estimate_range("aciq_exact", Sample.from_tensor(x), IntegerGrid(-8, 7))
    assert -low.item() == pytest.approx(FULL[name][3] * scaled, rel=0.01)
    assert high.item() == pytest.approx(-low.item() * 7 / 8, rel=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_relu_output_is_judged_by_its_positive_values(name):
    x = draw(name).relu()
    low, high = estimate_range(f"aciq:{name}", Sample.from_tensor(x), IntegerGrid(0, 15))
    assert low.item() == 0.0
    assert high.item() == pytest.approx(PAPER[name][4], rel=0.01)  # M + 1
    for spec in ("uint4", "uint4 affine", "int4 affine"):
        exact = estimate_range(f"aciq_exact:{name}", Sample.from_tensor(x), QuantSpec.parse(spec).grid)
        assert exact[1].item() == pytest.approx(15 * exact_scale(name, 0, 15, one_sided=True), rel=0.01)


def test_published_constants_cost_what_the_reference_says_at_2_bits():
    """34 % on Gauss, 18 % on Laplace, on levels -1..1."""
    for name, loss in (("gauss", 1.34), ("laplace", 1.18)):
        alphas = torch.tensor([aciq_threshold(name, 2), exact_scale(name, -1, 1)], dtype=torch.float64)
        paper, best = expected_error(name, alphas, alphas, 3).tolist()
        assert paper / best == pytest.approx(loss, abs=0.01)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("spec", ["int2 narrow", "int3", "int4", "int8", "uint3", "uint8"])
def test_exact_beats_the_paper_on_its_own_distribution(name, spec):
    grid = QuantSpec.parse(spec).grid
    x = draw(name)
    sample = Sample.from_tensor(x if grid.signed else x.relu())
    fit = fit_distributions(sample)
    assert fit.names() == [name]
    paper, exact = (
        fit.expected_mse(*qparams_from_bounds(*estimate_range(f"{r}:{name}", sample, grid), grid), grid).item()
        for r in ("aciq", "aciq_exact")
    )
    assert exact <= paper * (1 + 1e-6)


def test_zero_point_puts_the_range_around_the_mean():
    x = draw("gauss") * 0.5 + 1.0
    low, high = estimate_range("aciq:gauss", Sample.from_tensor(x), IntegerGrid(0, 15, affine=True))
    assert (low.item(), high.item()) == pytest.approx((1 - 0.5 * 2.5591, 1 + 0.5 * 2.5591), abs=0.01)


def test_mirrored_rows():
    x = draw("gauss").relu()
    for grid in (IntegerGrid(0, 15, affine=True), IntegerGrid(-7, 7)):
        for name in ("aciq", "aciq_exact"):
            low, high = estimate_range(name, Sample.from_tensor(torch.cat([x, -x])), grid)
            assert low[1].item() == -high[0].item()
            assert low[0].item() == high[1].item() == 0.0


HEAVY = {
    "gauss": lambda u: scipy.stats.norm.ppf(u),
    "laplace": lambda u: scipy.stats.laplace.ppf(u),
    "student": lambda u: scipy.stats.t.ppf(u, 3),
    "generalised normal": lambda u: scipy.stats.gennorm.ppf(u, 0.5),
}


def decibel(x, low, high, levels):
    """Signal to noise of `x` rounded to `levels` (lowest, highest), without a zero point, in numpy."""
    step = max(high / levels[1], low / levels[0])
    error = x - np.clip(np.rint(x / step), *levels) * step
    return 10 * np.log10((x**2).sum() / (error**2).sum())


@pytest.mark.parametrize("name", ["aciq", "aciq_exact"])
@pytest.mark.parametrize("kind", list(HEAVY))
def test_without_an_option_the_better_distribution_is_taken(kind, name):
    x = HEAVY[kind]((np.arange(100_000) + 0.5) / 100_000)
    sample = Sample.from_tensor(torch.tensor(x, dtype=torch.float32)[None])
    for bits in (2, 3, 4, 8):
        levels = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
        reached = [
            decibel(x, *(bound.item() for bound in estimate_range(name + option, sample, IntegerGrid(*levels))), levels)
            for option in ("", ":gauss", ":laplace")
        ]
        assert reached[0] == pytest.approx(max(reached), abs=0.02)
        if (kind, bits) == ("laplace", 8):
            assert reached[0] > 35.0  # 24 with the threshold for Gauss


def test_rows_choose_their_own_distribution():
    rows = torch.cat([draw("gauss"), draw("laplace")])
    _, high = estimate_range("aciq", Sample.from_tensor(rows), IntegerGrid(-127, 127))
    assert high.tolist() == pytest.approx([PAPER["gauss"][7], PAPER["laplace"][7]], rel=0.02)


def test_unknown_distribution():
    with pytest.raises(SpecError, match="gauss or laplace"):
        estimate_range("aciq:cauchy", Sample.from_tensor(draw("gauss")), IntegerGrid(-8, 7))


def test_fit_and_prediction_follow_the_mean_and_the_zeros():
    x = torch.cat([draw("gauss") * 0.5 + 2.0, draw("laplace").relu(), -draw("gauss").relu()])
    fit = fit_distributions(Sample.from_tensor(x))
    assert fit.names() == ["gauss", "laplace", "gauss"]
    assert fit.one_sided.tolist() == [False, True, True]
    assert fit.share.tolist() == pytest.approx([1.0, 0.5, 0.5], abs=0.01)
    assert fit.centre.tolist() == pytest.approx([2.0, 0.0, 0.0], abs=0.01)
    grid = IntegerGrid(0, 7, affine=True)
    scale, zero_point = qparams_from_bounds(torch.tensor([-0.1, 0.0, -2.4]), torch.tensor([3.5, 5.0, 0.0]), grid)
    rounded = ((x / scale[:, None]).round() + zero_point[:, None]).clamp(0, 7).sub(zero_point[:, None]) * scale[:, None]
    measured = (x - rounded).double().square().mean(1)
    assert fit.expected_mse(scale, zero_point, grid).tolist() == pytest.approx(measured.tolist(), rel=0.04)
