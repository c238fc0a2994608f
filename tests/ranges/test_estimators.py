"""Properties of every estimator, checked for all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lq_plugin.errors import SpecError
from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.intent.ranges import RANGES, is_learned, number_in
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.ranges import Histogram, Sample, estimate_range, register_range, registered_ranges
from lq_plugin.ranges.estimators.percentile import quantile
from lq_plugin.ranges.registry import _ESTIMATORS

CALIBRATED = ["minmax", "percentile:99", "mse", "kl", "aciq", "aciq_exact", "octav"]
SPECS = ["int1", "int2", "int4 narrow", "int8", "uint1", "uint8", "uint4 affine", "int8 affine"]


def rows_of_every_kind():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 200, generator=generator)
    x[1] = x[1].relu()
    x[2] = -x[2].relu()
    x[3] = x[3] * 0.2 + 3
    x[4] = 0.0
    x[5] = 1.75
    x[6] = -0.25
    x[7, 0] = 300.0
    x[8] = x[8].sign() * x[8].abs().pow(4)
    return x


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("spec", SPECS)
class TestEveryEstimator:
    def test_bounds_hold_zero_and_stay_near_the_data(self, name, spec):
        x = rows_of_every_kind()
        grid = QuantSpec.parse(spec).grid
        low, high = estimate_range(name, Sample.from_tensor(x), grid)
        assert low.dtype == high.dtype == torch.float32
        assert torch.isfinite(low).all()
        assert torch.isfinite(high).all()
        assert (low <= 0).all()
        assert (high >= 0).all()
        scale, zero_point = qparams_from_bounds(low, high, grid)
        widest, _ = qparams_from_bounds(x.amin(1), x.amax(1), grid)
        # Half a level above the data is as far as the search on the real grid goes.
        assert (scale <= widest * (1.1 if name == "mse" else 1.0 + 1e-5)).all()
        assert (low[4], high[4]) == (0, 0)
        if grid.affine:
            levels_low = (grid.quant_min - zero_point) * scale
            assert (levels_low >= low - scale * 0.51).all()

    def test_one_sided_rows_spend_no_level_on_the_other_side(self, name, spec):
        x = rows_of_every_kind()[[1, 5]]
        low, high = estimate_range(name, Sample.from_tensor(x), QuantSpec.parse(spec).grid)
        assert low.tolist() == [0.0, 0.0]
        if spec != "int1":  # its levels are -1 and 0
            assert (high > 0).all()

    def test_rows_are_independent(self, name, spec):
        x = rows_of_every_kind()
        grid = QuantSpec.parse(spec).grid
        low, high = estimate_range(name, Sample.from_tensor(x), grid)
        for row in range(len(x)):
            alone = estimate_range(name, Sample.from_tensor(x[row : row + 1]), grid)
            torch.testing.assert_close((low[row : row + 1], high[row : row + 1]), alone, rtol=1e-5, atol=0.0)

    def test_a_power_of_two_scales_the_bounds(self, name, spec):
        x = rows_of_every_kind()
        grid = QuantSpec.parse(spec).grid
        low, high = estimate_range(name, Sample.from_tensor(x), grid)
        for exponent in (-70, 60):
            scaled = estimate_range(name, Sample.from_tensor(x * 2.0**exponent), grid)
            assert torch.equal(scaled[0], low * 2.0**exponent)
            assert torch.equal(scaled[1], high * 2.0**exponent)

    def test_histogram_gives_nearly_the_same(self, name, spec):
        grid = QuantSpec.parse(spec).grid
        x = torch.randn(1, 60_000, generator=torch.Generator().manual_seed(0))
        x = x if grid.signed or grid.affine else x.relu()
        histogram = Histogram(max_samples=None)
        histogram.update(x)
        exact = estimate_range(name, Sample.from_tensor(x), grid)
        binned = estimate_range(name, histogram.sample(), grid)
        scales = qparams_from_bounds(*exact, grid)[0], qparams_from_bounds(*binned, grid)[0]
        # The curves of kl and mse are flat or rough around the minimum.
        tolerance = {"kl": 0.2, "mse": 0.03}.get(name, 0.01)
        torch.testing.assert_close(*scales, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("spec", ["int2 narrow", "int4 narrow"])
def test_mirrored_data_has_the_same_scale_on_symmetric_levels(name, spec):
    x = rows_of_every_kind()
    grid = QuantSpec.parse(spec).grid
    bounds = estimate_range(name, Sample.from_tensor(x), grid)
    mirrored = estimate_range(name, Sample.from_tensor(-x), grid)
    scales = qparams_from_bounds(*bounds, grid)[0], qparams_from_bounds(*mirrored, grid)[0]
    torch.testing.assert_close(*scales, rtol=1e-4, atol=0.0)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=30),
    name=st.sampled_from(CALIBRATED),
    spec=st.sampled_from(SPECS),
)
def test_any_row_gives_finite_bounds_around_zero(values, name, spec):
    low, high = estimate_range(name, Sample.from_tensor(torch.tensor([values])), QuantSpec.parse(spec).grid)
    assert -2500 < low.item() <= 0.0 <= high.item() < 2500


@pytest.mark.parametrize("name", CALIBRATED)
def test_magnitudes_at_the_ends_of_float32(name):
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    for factor in (1e37, 1e-36):
        for bound in estimate_range(name, Sample.from_tensor(x * factor), IntegerGrid(-8, 7)):
            assert torch.isfinite(bound).all()
            assert (bound != 0).all()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    repeats=st.lists(st.integers(0, 4), min_size=40, max_size=40),
    share=st.floats(0.0, 1.0),
)
def test_quantiles_are_numpys(values, repeats, share):
    x = np.array(values, dtype=np.float32)
    assert quantile(torch.tensor(x[None]), None, share).item() == pytest.approx(
        np.quantile(x.astype(float), share), abs=1e-3
    )
    counts = np.array(repeats[: len(values)])
    if counts.sum():
        got = quantile(torch.tensor(x[None]), torch.tensor(counts[None]).float(), share).item()
        assert got == pytest.approx(np.quantile(np.repeat(x.astype(float), counts), share), abs=1e-3)


def test_percentile_definitions():
    x = torch.randn(1, 5001, generator=torch.Generator().manual_seed(0)) + 0.5
    values = x[0].double().numpy()
    low, high = estimate_range("percentile:99", Sample.from_tensor(x), IntegerGrid(0, 255, affine=True))
    assert (low.item(), high.item()) == pytest.approx(
        (np.quantile(values, 0.005), np.quantile(values, 0.995)), rel=1e-5
    )
    low, high = estimate_range("percentile:99", Sample.from_tensor(x), IntegerGrid(-8, 7))
    assert (-low.item(), high.item()) == pytest.approx((np.quantile(np.abs(values), 0.99),) * 2, rel=1e-5)
    low, high = estimate_range("percentile:99", Sample.from_tensor(x), IntegerGrid(0, 15))
    assert (low.item(), high.item()) == pytest.approx((0.0, np.quantile(values, 0.99)), rel=1e-5)
    assert (
        estimate_range("percentile:100", Sample.from_tensor(x.relu()), IntegerGrid(0, 15))[1].item() == x.max().item()
    )
    with pytest.raises(SpecError, match=r"50\.\.100"):
        estimate_range("percentile:many", Sample.from_tensor(x), IntegerGrid(-8, 7))


def test_minmax_covers_both_sides():
    sample = Sample.from_tensor(torch.tensor([[-1.0, 3.0]]))
    for name in ("minmax", "ema"):
        assert [b.item() for b in estimate_range(name, sample, IntegerGrid(-8, 7))] == [-1.0, 3.0]
        assert [b.item() for b in estimate_range(name, sample, IntegerGrid(0, 15))] == [0.0, 3.0]


class TestLearnedRangesStart:
    def test_lsq_step_size(self):
        x = torch.randn(3, 1000)
        for grid in (IntegerGrid(-8, 7), IntegerGrid(0, 15)):
            scale, zero_point = qparams_from_bounds(*estimate_range("lsq", Sample.from_tensor(x), grid), grid)
            torch.testing.assert_close(scale, 2 * x.abs().mean(1) / grid.quant_max**0.5)
            assert (zero_point == 0).all()

    def test_lsq_with_a_zero_point(self):
        x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
        low, high = estimate_range("lsq", Sample.from_tensor(x), IntegerGrid(0, 15, affine=True))
        assert high.item() == pytest.approx(0.2 + 1.5, rel=0.01)
        assert low.item() == pytest.approx(-(0.2 + 1.5), rel=0.01)
        assert estimate_range("lsq", Sample.from_tensor(x.relu()), IntegerGrid(0, 15, affine=True))[0].item() == 0.0

    def test_lsq_needs_a_positive_level(self):
        with pytest.raises(SpecError, match="positive level"):
            estimate_range("lsq", Sample.from_tensor(torch.randn(1, 4)), IntegerGrid(-1, 0))

    def test_pact_starts_at_the_maximum(self):
        x = torch.randn(2, 100).relu()
        low, high = estimate_range("pact", Sample.from_tensor(x), IntegerGrid(0, 15))
        assert torch.equal(high, x.amax(1))
        assert low.tolist() == [0.0, 0.0]


class TestRegistry:
    def test_every_name_of_a_spec_has_an_estimator(self):
        assert set(RANGES) <= set(registered_ranges()) | {"half"}
        assert set(registered_ranges()) >= {name for name in RANGES if is_learned(name)} >= {"lsq", "pact"}

    def test_unknown_names_are_refused_with_a_hint(self):
        with pytest.raises(SpecError, match="Did you mean 'octav'"):
            estimate_range("octave", Sample.from_tensor(torch.randn(1, 4)), IntegerGrid(-8, 7))

    @pytest.mark.parametrize("name", ["minmax", "mse", "kl", "octav", "pact"])
    def test_options_that_mean_nothing_are_refused(self, name):
        with pytest.raises(SpecError, match="takes no option"):
            estimate_range(f"{name}:3", Sample.from_tensor(torch.randn(1, 4)), IntegerGrid(0, 7))

    def test_new_estimators_can_be_named_in_a_spec(self):
        try:

            @register_range("three_sigma", "three standard deviations", option=number_in(0.5, 6.0))
            def three_sigma(sample, grid, option):
                width = float(option or 3) * sample.average(sample.values.square()).sqrt()
                return -width, width

            spec = QuantSpec.parse("int4 three_sigma:2")
            x = torch.randn(4, 300) * 1e-5
            _, high = estimate_range(spec.range, Sample.from_tensor(x), spec.grid)
            torch.testing.assert_close(high, 2 * x.square().mean(1).sqrt(), rtol=1e-4, atol=0.0)
            with pytest.raises(SpecError, match="already registered"):
                register_range("three_sigma", "another")(lambda sample, grid, option: (sample.minimum, sample.maximum))
        finally:
            _ESTIMATORS.pop("three_sigma", None)
            RANGES.pop("three_sigma", None)

    def test_blocks_of_rows_change_nothing(self, monkeypatch):
        x = rows_of_every_kind()
        whole = estimate_range("mse", Sample.from_tensor(x), IntegerGrid(-8, 7))
        monkeypatch.setattr("lq_plugin.ranges.registry._BLOCK", 450)
        torch.testing.assert_close(
            estimate_range("mse", Sample.from_tensor(x), IntegerGrid(-8, 7)), whole, rtol=1e-5, atol=0.0
        )
