"""KL calibration against a plain Python reference, and the pitfalls."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.native import available, use_native
from lq_plugin.quantizers import make_activation_quantizer
from lq_plugin.ranges import Histogram, Sample, estimate_range
from lq_plugin.ranges.estimators.kl import best_bin, kl_histogram
from lq_plugin.ranges.magnitudes import fold


def reference_bin(counts, beyond, levels):
    """Migacz's slides, one bin at a time."""
    best, best_divergence = None, np.inf
    for kept in range(levels, len(counts) + 1):
        p = np.array(counts[:kept], dtype=float)
        q_source = p.copy()
        p[-1] += sum(counts[kept:]) + beyond
        if 2 * q_source.sum() < p.sum():  # most values would be clipped
            continue
        q = np.zeros(kept)
        level = np.array([j * levels // kept for j in range(kept)])
        for k in range(levels):
            members = level == k
            filled = members & (q_source > 0)
            if filled.any():
                q[filled] = q_source[members].sum() / filled.sum()
        divergence = scipy.stats.entropy(p, q)
        if divergence <= best_divergence + 1e-12:  # the last one on a tie
            best, best_divergence = kept, min(divergence, best_divergence)
    return best, best_divergence


@pytest.fixture(params=["torch", "compiled"])
def search(request):
    """Each way of searching, with and without the compiled kernels."""
    if request.param == "compiled" and not available():
        pytest.skip("no C++ compiler")
    with use_native(request.param == "compiled"):
        yield


@pytest.mark.usefixtures("search")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 30), min_size=8, max_size=40),
    beyond=st.sampled_from([0, 1, 7]),
    levels=st.sampled_from([2, 3, 4, 8]),
)
def test_same_divergence_as_the_reference(counts, beyond, levels):
    counts[0] += 1  # something to keep
    expected = reference_bin(counts, beyond, levels)[0]
    got = int(best_bin(torch.tensor([counts]).double(), torch.tensor([float(beyond)]).double(), levels))
    if expected is None:  # every divergence is infinite
        assert got == len(counts)
        return
    assert got == expected


@pytest.mark.usefixtures("search")
def test_rows_are_independent():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 50, (5, 64), generator=generator).double()
    beyond = torch.tensor([0.0, 3.0, 0.0, 9.0, 1.0]).double()
    together = best_bin(counts, beyond, 4)
    for row in range(5):
        assert best_bin(counts[row : row + 1], beyond[row : row + 1], 4).item() == together[row].item()
        assert reference_bin(counts[row].tolist(), beyond[row].item(), 4)[0] == together[row].item()


def divergences(counts, beyond, levels):
    """KL(P || Q) for every number of kept bins from `levels` on, in numpy: `reference_bin` without its inner loops."""
    found = np.full(len(counts) + 1 - levels, np.inf)
    everything = counts.sum() + beyond
    for kept in range(levels, len(counts) + 1):
        inside = counts[:kept].sum()
        if 2 * inside < everything or (counts[kept - 1] == 0 and inside < everything):
            continue
        p = counts[:kept].astype(float)
        level = np.arange(kept) * levels // kept
        mass, bins = (np.bincount(level, weights=of, minlength=levels) for of in (p, p > 0))
        p[-1] += everything - inside
        q = (mass / np.maximum(bins, 1))[level][p > 0]
        p = p[p > 0]
        found[kept - levels] = (p * np.log(p / q)).sum() / everything - np.log(everything / inside)
    return found


DISTRIBUTIONS = {
    "normal": lambda g, n: g.normal(size=n),
    "laplace": lambda g, n: g.laplace(size=n),
    "student": lambda g, n: g.standard_t(3, size=n),
    "two peaks": lambda g, n: np.concatenate([g.normal(1.0, 0.1, n // 2), g.normal(4.0, 0.3, n // 2)]),
}


@pytest.mark.parametrize("levels", [8, 128])
@pytest.mark.parametrize("kind", list(DISTRIBUTIONS))
def test_no_number_of_bins_diverges_less(kind, levels):
    """The divergence jumps where the tail has few values to a bin: a search near the best of some candidates fails."""
    generator = np.random.default_rng(levels)
    for n in (20_000, 200_000):
        x = np.abs(DISTRIBUTIONS[kind](generator, n))
        end = min(2 * np.quantile(x, 0.999), x.max())
        counts, beyond = np.histogram(x, 2048, (0.0, end))[0], (x > end).sum()
        expected = divergences(counts, beyond, levels)
        got = int(best_bin(torch.tensor(counts).double()[None], torch.tensor([float(beyond)]).double(), levels))
        assert got == len(counts) - int(expected[::-1].argmin())


def test_values_far_from_zero_are_not_all_clipped():
    """P and Q are equal where the lowest value alone is kept, which must not win."""
    x = normal(50_000) * 0.3 + 4.0
    assert 4.0 < estimate_range("kl", Sample.from_tensor(x), IntegerGrid(-128, 127))[1].item() < 6.0


@pytest.mark.parametrize("spec", ["int8 kl", "uint8 affine kl", "int4 kl"])
def test_the_order_of_the_data_does_not_matter(spec):
    x = normal(150_000)[0] * torch.linspace(0.5, 2.0, 150_000)  # what comes later is larger
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    found = []
    for batches in (x.split(50_000), x.flip(0).split(30_000), shuffled.split(75_000)):
        quantizer = make_activation_quantizer(QuantSpec.parse(spec), "input", 1, 1)
        quantizer.collector = quantizer.new_collector()
        for batch in batches:
            quantizer(batch)
        quantizer.load_sample(quantizer.collector.sample())
        found.append(quantizer.scale.item())
    assert found[0] == found[1] == found[2]


def normal(n=500_000, seed=0):
    return torch.randn(1, n, generator=torch.Generator().manual_seed(seed))


def samples(x):
    histogram = Histogram()
    for part in x.chunk(4, dim=1):
        histogram.update(part)
    return {"values": Sample.from_tensor(x), "histogram": histogram.sample()}


@pytest.mark.parametrize("kind", ["values", "histogram"])
def test_relu_zeros_do_not_make_it_collapse(kind):
    """With the zeros in bin 0 the published routine returns 1.77; without them about 4.65."""
    sample = samples(normal().relu())[kind]
    for spec in ("int8", "uint8"):
        assert 4.2 <= estimate_range("kl", sample, QuantSpec.parse(spec).grid)[1].item() <= 5.0


@pytest.mark.parametrize("kind", ["values", "histogram"])
def test_low_bit_widths(kind):
    """At 4 bits KL covers too much (3.56 against 2.48), but it clips."""
    sample = samples(normal())[kind]
    assert 3.2 <= estimate_range("kl", sample, IntegerGrid(-7, 7))[1].item() <= 3.8
    two_bits = estimate_range("kl", sample, IntegerGrid(-1, 1))[1].item()
    assert 1.5 <= two_bits <= 3.4


@pytest.mark.parametrize("kind", ["values", "histogram"])
@pytest.mark.parametrize("spec", ["int4", "int8"])
def test_one_outlier_at_80_sigma(kind, spec):
    clean, dirty = normal(), normal()
    dirty[0, 1000] = 80.0
    grid = QuantSpec.parse(spec).grid
    expected = -estimate_range("kl", samples(clean)[kind], grid)[0].item()
    assert -estimate_range("kl", samples(dirty)[kind], grid)[0].item() == pytest.approx(expected, rel=0.25)


def test_unsigned_has_twice_the_levels():
    """With 2^b levels the threshold lies further out than with 2^(b-1)."""
    sample = samples(normal().relu())["values"]
    assert estimate_range("kl", sample, IntegerGrid(0, 15))[1] > estimate_range("kl", sample, IntegerGrid(-8, 7))[1]


def test_few_values_still_get_clipped_at_low_bits_and_many_bits_get_the_range():
    x = torch.randn(32, 576, generator=torch.Generator().manual_seed(1))
    low, high = estimate_range("kl", Sample.from_tensor(x), IntegerGrid(-7, 7))
    assert (high < 0.999 * x.abs().amax(1)).float().mean() > 0.5
    _, high = estimate_range("kl", Sample.from_tensor(x), QuantSpec.parse("int16 narrow").grid)
    torch.testing.assert_close(high, x.abs().amax(1))
    torch.testing.assert_close(low, -low.neg())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("spec", ["int4", "uint4"])
def test_counts_of_exact_values_are_numpys(zeros, spec):
    """Zeros are left out, the value at the end is in the last bin, what lies beyond in none; bins are half open."""
    grid = QuantSpec.parse(spec).grid
    x = (
        torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * 64
    ).round() / 64  # many on the edges of bins
    x = x if zeros else x.masked_fill(x == 0, 0.01)
    end = torch.tensor([1.0, 2.0, 8.0], dtype=torch.float64)
    x[0, 0], x[1, 0] = 1.0, 1e30
    got = kl_histogram(fold(Sample.from_tensor(x), grid), end, 128)
    for row in range(3):
        y = x[row].double().numpy()
        y = np.maximum(y, 0.0) if spec == "uint4" else np.abs(y)
        assert got[row].tolist() == np.histogram(y[y > 0], 128, (0.0, end[row].item()))[0].tolist()
