"""`Sample`: what goes in, and what is refused."""

import pytest
import torch

from lq_plugin.errors import CalibrationError
from lq_plugin.ranges import Sample, summarize


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
@pytest.mark.parametrize("max_points", [4, 1000])
def test_non_finite_values_are_refused_by_name(bad, word, max_points):
    x = torch.randn(3, 20)
    x[1, 7] = bad
    with pytest.raises(CalibrationError, match=rf"encoder\.0\.weight: {word} in 1 of 3 rows"):
        summarize(x, name="encoder.0.weight", max_points=max_points)
    with pytest.raises(CalibrationError, match=f"w: {word}"):
        Sample.from_tensor(x, mask=torch.ones(3, 20, dtype=torch.bool), name="w")


def test_padding_never_enters():
    x = torch.randn(3, 8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[2, 5:] = False
    dirty = x.masked_fill(~mask, torch.nan)
    sample = Sample.from_tensor(dirty, mask)
    assert sample.total().tolist() == [8, 8, 5]
    assert sample.minimum[2] == x[2, :5].min()
    assert sample.average(sample.values)[2].item() == pytest.approx(x[2, :5].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sample.from_tensor(torch.empty(0, 4), name="w"), "w: no elements"),
        (lambda: Sample.from_tensor(torch.empty(4, 0)), "no elements"),
        (lambda: Sample.from_tensor(torch.randn(4)), r"\[rows, n\]"),
        (lambda: Sample.from_tensor(torch.randn(2, 4), torch.ones(2, 3, dtype=torch.bool)), "mask must be like"),
        (
            lambda: Sample.from_tensor(torch.randn(2, 4), torch.tensor([[True] * 4, [False] * 4])),
            "1 of 2 rows have no element",
        ),
        (lambda: Sample.from_histogram(torch.linspace(0, 1, 5), torch.ones(5)), "one edge more"),
        (lambda: Sample.from_histogram(torch.tensor([0.0, 2.0, 1.0]), torch.ones(2)), "ascend"),
        (lambda: Sample.from_histogram(torch.linspace(0, 1, 5), torch.zeros(4)), "empty histogram"),
        (lambda: Sample.from_histogram(torch.linspace(0, 1, 5), -torch.ones(4)), ">= 0"),
        (
            lambda: Sample(torch.randn(2, 3), torch.ones(2, 2), torch.zeros(3), torch.zeros(2)),
            "mass must be like.*minimum must be",
        ),
    ],
)
def test_impossible_samples(call, message):
    with pytest.raises(CalibrationError, match=message):
        call()


def test_normalized_is_exact():
    x = torch.randn(6, 50) * torch.tensor([1e-42, 1e-30, 1e-3, 1.0, 1e20, 3e37]).unsqueeze(1)
    x = torch.cat([x, torch.zeros(1, 50)])
    sample, factor = Sample.from_tensor(x).normalized()
    limit = sample.values.abs().amax(1)
    assert torch.all(limit[1:-1] < 4)
    assert torch.all(limit[1:-1] >= 0.5)
    assert torch.equal(sample.values[1:] * factor[1:].unsqueeze(1), x[1:])
    assert torch.equal(sample.maximum[1:] * factor[1:], x.amax(1)[1:])


def test_long_rows_become_histograms():
    x = torch.randn(2, 5000)
    short = summarize(x, max_points=1000)
    assert short.edges is not None
    assert short.values.shape[1] < 5000
    assert torch.equal(short.minimum, x.amin(1))
    assert torch.equal(short.maximum, x.amax(1))
    assert short.total().tolist() == pytest.approx([5000, 5000])
    assert Sample.from_tensor(x).edges is None


def test_histogram_bounds_hold_the_density():
    sample = Sample.from_histogram(
        torch.linspace(-4, 4, 9),
        torch.tensor([0, 1, 0, 5, 5, 0, 2, 0.0]),
        torch.tensor([3]),
        torch.tensor([-2.5]),
        torch.tensor([2.25]),
    )
    assert sample.edges.min() == -2.5
    assert sample.edges.max() == 2.25
    assert sample.total().item() == 16
