"""`Histogram` against the data itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lq_plugin.errors import CalibrationError
from lq_plugin.ranges import Histogram, Sample

STATE = ("counts", "zeros", "total", "minimum", "maximum", "octave")


def assert_equal(a: Histogram, b: Histogram) -> None:
    for key in STATE:
        assert torch.equal(getattr(a, key), getattr(b, key)), key


def filled(*parts, **options):
    histogram = Histogram(**options)
    for part in parts:
        histogram.update(part)
    return histogram


floats = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: 0.0 if abs(v) < 1e-30 else v)
batches = st.lists(st.lists(floats, min_size=1, max_size=20), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(batches=batches, cut=st.integers(0, 6), order=st.randoms())
def test_merge_equals_one_stream_in_any_order(batches, cut, order):
    parts = [torch.tensor([b]) for b in batches]
    joint = filled(*parts, max_samples=None)
    left, right = filled(*parts[:cut], max_samples=None), filled(*parts[cut:], max_samples=None)
    before = right.state_dict()
    left.merge(right)
    assert_equal(left, joint)
    for key, value in before.items():
        assert torch.equal(getattr(right, key), value), "merging changed the other histogram"
    order.shuffle(parts)
    assert_equal(filled(*parts, max_samples=None), joint)


@settings(max_examples=80, deadline=None)
@given(values=st.lists(floats, min_size=1, max_size=50))
def test_every_value_lies_in_its_bin(values):
    x = torch.tensor([values])
    histogram = filled(x, max_samples=None)
    assert histogram.zeros.item() == sum(v == 0 for v in values)
    assert histogram.minimum.item() == x.min().item()
    assert histogram.maximum.item() == x.max().item()
    counts = torch.cat([histogram.counts[:, :2048].flip(1), histogram.counts[:, 2048:]], dim=1)[0]
    edges = histogram.edges()[0].double()
    nonzero = x[x != 0].double()
    # Bins are closed towards zero.
    index = torch.where(
        nonzero > 0,
        torch.searchsorted(edges, nonzero, right=True) - 1,
        torch.searchsorted(edges, nonzero, right=False) - 1,
    )
    assert torch.equal(counts, torch.bincount(index, minlength=4096))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_one_row_is_counted_as_several_are(scale):
    """One row that counts all has a shorter way."""
    x = torch.randn(1, 300_000, generator=torch.Generator().manual_seed(0)) * scale
    x[0, :1000] = 0.0
    x[0, 1000:1100] *= 1e3
    one, two = (
        filled(x, x * 5, max_samples=None),
        filled(x.expand(2, -1), x.expand(2, -1) * 5, rows=2, max_samples=None),
    )
    for key in STATE:
        assert torch.equal(getattr(one, key)[0], getattr(two, key)[1]), key


def test_bins_are_narrower_than_one_percent():
    histogram = filled(torch.tensor([[1.0]]))
    edges = histogram.edges()[0]
    positive = edges[edges > 0]
    assert (positive.diff() / positive[:-1]).max() <= 1 / 128
    assert positive[0] <= 2.0 * 2.0**-16 * (1 + 1 / 128)
    assert positive[-1] > 1.0


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-60, 60))
def test_power_of_two_changes_only_the_labels(exponent):
    x = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    plain, scaled = filled(x).sample(), filled(x * 2.0**exponent).sample()
    assert torch.equal(plain.mass, scaled.mass)
    assert torch.equal(plain.values * 2.0**exponent, scaled.values)


def test_rows_are_separate():
    x = torch.randn(3, 400) * torch.tensor([[1.0], [1e-4], [1e5]])
    joint = filled(x, x * 3, rows=3)
    for row in range(3):
        alone = filled(x[row : row + 1], x[row : row + 1] * 3)
        for key in STATE:
            assert torch.equal(getattr(joint, key)[row], getattr(alone, key)[0])
    sample = joint.sample()
    torch.testing.assert_close(sample.total(), torch.full((3,), 800.0, dtype=torch.float64))
    both = torch.cat([x, x * 3], dim=1)
    torch.testing.assert_close(
        sample.average(sample.values.double().square()), both.double().square().mean(1), rtol=0.01, atol=0.0
    )


def test_ranks_reduce_with_a_common_range():
    parts = [torch.randn(2, 300) * scale for scale in (1e-3, 1.0, 500.0)]
    ranks = [filled(p, rows=2) for p in parts]
    common = torch.stack([h.common_range() for h in ranks]).amax(0)
    for h in ranks:
        h.rebin(common)
    joint = filled(*parts, rows=2)
    assert torch.equal(sum(h.counts for h in ranks), joint.counts)
    assert torch.equal(common, joint.octave)
    with pytest.raises(CalibrationError, match="only grow"):
        ranks[0].rebin(common - 1)


def test_one_outlier_leaves_the_resolution():
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    dirty = x.clone()
    dirty[0, 50] = 80.0
    sample = filled(dirty, max_samples=None).sample()
    width = sample.edges.diff(dim=1)[0]
    centre = (sample.edges[0, :-1] + sample.edges[0, 1:]) / 2
    assert width[(centre.abs() < 4) & (sample.mass[0, : len(width)] > 0)].max() < 0.04
    assert sample.maximum.item() == 80.0


def test_zeros_are_one_exact_point():
    x = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(0)).relu()
    x[0, :5] = -0.0
    sample = filled(x).sample()
    at_zero = sample.values[0] == 0.0
    assert at_zero.sum() == 1
    assert sample.mass[0, at_zero].item() == (x == 0).sum().item()
    assert sample.values[0, ~at_zero].min() > 0
    assert sample.minimum.item() == 0.0


@pytest.mark.parametrize("size", [(8, 16, 32, 32), (64, 3, 32, 32), (7, 5, 3), (1, 4096)])
def test_strided_sampling_prefers_no_channel_or_pixel(size):
    """Each position along each dim gets its share of the samples."""
    histogram = Histogram(max_samples=1024)
    n = int(np.prod(size))
    stride = histogram._stride(n)
    taken = np.unravel_index(np.arange(0, n, stride), size)
    for axis, extent in zip(taken, size, strict=True):
        counts = np.bincount(axis, minlength=extent)
        if len(axis) >= 8 * extent:
            assert counts.min() > 0
            assert counts.max() <= 2 * counts.mean() + 1


def test_sampled_statistics_are_close_and_bounds_exact():
    x = torch.randn(16, 8, 64, 64, generator=torch.Generator().manual_seed(0)).relu()
    x[3, 1, 5, 7] = 9.25
    every, some = filled(x.view(1, -1), max_samples=None).sample(), filled(x, max_samples=2**14).sample()
    assert some.maximum.item() == 9.25
    assert some.mass[:, -1].item() == every.mass[:, -1].item() == (x == 0).sum().item()
    torch.testing.assert_close(some.total(), every.total())
    torch.testing.assert_close(
        some.average(some.values.double() ** 2), every.average(every.values.double() ** 2), rtol=0.05, atol=0.0
    )


def test_any_layout_is_read():
    x = torch.randn(4, 8, 6, 5)
    reference = filled(x, max_samples=None)
    assert_equal(filled(x.contiguous(memory_format=torch.channels_last), max_samples=None), reference)
    assert_equal(filled(x.transpose(0, 2), max_samples=None), reference)
    assert_equal(filled(torch.stack([x, x], dim=1)[:, 1], max_samples=None), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x = torch.randn(1, 300).to(dtype)
    assert_equal(filled(x, max_samples=None), filled(x.float(), max_samples=None))


def test_extremes_that_the_stride_missed_have_mass():
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    x[0, 1] = 50.0
    sample = filled(x, max_samples=100).sample()
    assert sample.values.max() == pytest.approx(50.0, rel=0.01)


def test_atom_at_the_maximum_keeps_its_place():
    """ReLU6 has many values at exactly 6, the lower edge of a bin."""
    x = (torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)) * 4).clamp(0, 6)
    sample = filled(x, max_samples=None).sample()
    assert sample.values.max().item() == 6.0
    top = sample.mass[0, sample.values[0].argmax()].item()
    assert top >= (x == 6).sum().item()


def test_state_dict_round_trip():
    histogram = filled(torch.randn(2, 100), rows=2)
    copy = Histogram(rows=2)
    copy.load_state_dict(histogram.state_dict())
    assert_equal(copy, histogram)
    copy.update(torch.randn(2, 100))
    assert copy.total.tolist() == [200, 200]
    assert histogram.total.tolist() == [100, 100]
    with pytest.raises(CalibrationError, match="counts has shape"):
        Histogram(rows=3).load_state_dict(histogram.state_dict())
    with pytest.raises(CalibrationError, match="zeros is missing"):
        copy.load_state_dict({k: v for k, v in histogram.state_dict().items() if k != "zeros"})


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_non_finite_values_are_refused_and_leave_no_trace(bad, word):
    histogram = Histogram(name="layer1.conv")
    histogram.update(torch.randn(1, 50))
    before = histogram.state_dict()
    x = torch.randn(1, 5000)
    x[0, 3] = bad
    with pytest.raises(CalibrationError, match=rf"layer1\.conv: {word}"):
        histogram.update(x)
    for key, value in before.items():
        assert torch.equal(getattr(histogram, key), value)


def test_state_outlives_inference_mode():
    """Lightning validates under inference mode; merging and resuming happen outside."""
    x = torch.randn(1, 200)
    with torch.inference_mode():
        histogram = filled(x * 1)
        histogram.update(x * 40)
    histogram.update(x)
    histogram.merge(filled(x * 1e6))
    assert histogram.total.item() == 800
    assert not histogram.counts.is_inference()


def test_bad_calls():
    with pytest.raises(CalibrationError, match="no data"):
        Histogram(name="fc").sample()
    with pytest.raises(CalibrationError, match="multiple of 128"):
        Histogram(bins=1000)
    with pytest.raises(CalibrationError, match=r"expected \[4, n\]"):
        Histogram(rows=4).update(torch.randn(3, 5))
    with pytest.raises(CalibrationError, match="floating point"):
        Histogram().update(torch.arange(4))
    with pytest.raises(CalibrationError, match="cannot merge"):
        Histogram(rows=2).merge(Histogram(rows=1))
    empty = Histogram()
    empty.update(torch.empty(1, 0))
    assert empty.total.item() == 0


def test_all_zero_stream():
    sample = filled(torch.zeros(1, 10)).sample()
    assert isinstance(sample, Sample)
    assert sample.total().item() == 10
    assert sample.minimum.item() == sample.maximum.item() == 0.0
