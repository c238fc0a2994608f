"""The table: measured against fake_quantize, predicted against measured."""

import math

import pytest
import torch

from lq_plugin.errors import SpecError
from lq_plugin.functional.affine import fake_quantize, qparams_from_bounds
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.ranges import Histogram, Sample, compare_ranges
from lq_plugin.ranges.laboratory import COMPARED


def draw(kind, rows=1, n=100_000):
    torch.manual_seed(0)
    x = torch.randn(rows, n) if kind == "gauss" else torch.distributions.Laplace(0.0, 1.0).sample((rows, n))
    return x


@pytest.mark.parametrize("kind", ["gauss", "laplace"])
@pytest.mark.parametrize("spec", ["int4", "int8", "uint4", "uint4 affine"])
def test_predictions_hold_on_their_distribution(kind, spec):
    x = draw(kind) if spec.startswith("int") else draw(kind).relu()
    table = compare_ranges(Sample.from_tensor(x), spec)
    assert table.distribution == kind
    for entry in table.entries():
        # At 8 bits the error is that of a few values in the tail.
        assert entry.predicted_mse == pytest.approx(entry.measured_mse, rel=0.3 if spec == "int8" else 0.06), entry


@pytest.mark.parametrize("spec", ["int3", "int4 narrow", "uint4 affine"])
def test_measured_columns(spec):
    x = draw("laplace", 3, 500) * torch.tensor([[1e-3], [1.0], [20.0]])
    grid = QuantSpec.parse(spec).grid
    table = compare_ranges(Sample.from_tensor(x), spec)
    assert [e.range for e in table.entries()] == list(COMPARED)
    for entry in table.row_entries():
        low, high = (table.bounds[entry.range][k][entry.row] for k in (0, 1))
        scale, zero_point = qparams_from_bounds(low, high, grid)
        error = (fake_quantize(x[entry.row], scale, zero_point, grid) - x[entry.row]).double().square().mean()
        assert entry.measured_mse == pytest.approx(error.item(), rel=1e-4)
        power = x[entry.row].double().square().mean()
        assert entry.sqnr_db == pytest.approx(10 * math.log10(power / error), abs=1e-3)
        assert (entry.minimum, entry.maximum) == (low.item(), high.item())
        assert 0 <= entry.clipped < 1
    for row in range(3):
        entries = [e for e in table.row_entries() if e.row == row]
        (winner,) = [e for e in entries if e.wins]
        assert winner.measured_mse == min(e.measured_mse for e in entries)


def test_means_over_rows():
    x = draw("gauss", 2, 300) * torch.tensor([[1.0], [3.0]])
    table = compare_ranges(Sample.from_tensor(x), "int4", ["minmax", "mse"])
    rows = [e for e in table.row_entries() if e.range == "mse"]
    entry = next(e for e in table.entries() if e.range == "mse")
    assert entry.row is None
    assert entry.measured_mse == pytest.approx(sum(e.measured_mse for e in rows) / 2)
    assert entry.minimum == min(e.minimum for e in rows)
    assert table.best == "mse"
    assert entry.wins
    assert [e.wins for e in table.entries()] == [False, True]


def test_mse_wins_and_clipping_is_counted():
    x = draw("laplace", 1, 20_000)
    table = compare_ranges(Sample.from_tensor(x), "int3")
    best = {e.range: e for e in table.entries()}
    assert table.best == "mse"
    assert best["minmax"].clipped == 0.0
    assert best["octav"].clipped > 0.0
    assert best["mse"].sqnr_db > best["minmax"].sqnr_db + 3


def test_one_histogram_serves_all():
    x = draw("gauss", 1, 200_000).relu()
    histogram = Histogram()
    histogram.update(x)
    binned, exact = (
        compare_ranges(histogram.sample(), "uint4"),
        compare_ranges(Sample.from_tensor(x), "uint4"),
    )
    for a, b in zip(binned.entries(), exact.entries(), strict=True):
        assert a.measured_mse == pytest.approx(b.measured_mse, rel=0.08), a.range
    assert binned.distribution == "gauss"


def test_records_are_plain():
    table = compare_ranges(Sample.from_tensor(draw("gauss", 2, 64)), "int4")
    for per_row, count in ((False, 7), (True, 14)):
        records = table.records(per_row)
        assert len(records) == count
        for record in records:
            assert all(value is None or type(value) in (str, int, float, bool) for value in record.values())


def test_extreme_magnitudes_and_zeros():
    x = torch.cat([draw("gauss", 1, 64) * 1e-15, draw("gauss", 1, 64) * 1e15, torch.zeros(1, 64)])
    table = compare_ranges(Sample.from_tensor(x), "int8")
    for entry in table.row_entries():
        if entry.row < 2:
            assert 30 < entry.sqnr_db < 60
            assert math.isfinite(entry.predicted_mse)
        else:
            assert entry.measured_mse == 0.0


def test_unknown_estimators_are_refused():
    with pytest.raises(SpecError, match="unknown range 'median'"):
        compare_ranges(Sample.from_tensor(draw("gauss", 1, 64)), "int4", ["mse", "median"])
