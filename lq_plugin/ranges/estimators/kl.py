"""`kl`: the threshold whose quantized histogram diverges least from the original (TensorRT).

For a threshold at bin i, P is the histogram up to there with everything beyond added to its last
bin, Q the same bins without the outliers, merged into as many levels as the grid has on [0, t], each
spread evenly over its bins that are not empty. The i with the least KL(P || Q) wins, the largest on a
tie; the threshold is (i + 1/2) bin widths.

The divergence jumps from one i to the next where the tail has few values to a bin, so its minimum is looked for among
all i. It has two parts: what clipping adds, which costs the same for any number of levels, and what merging adds, which
no level makes smaller. The compiled search drops an i as soon as its sum is above the least one found.

What departs from the slides, and why:
* exact zeros are left out (they are exact on every grid; kept, they make a ReLU output collapse);
* the search starts at as many bins as levels, not at 128, which is a constant for 8 bits;
* the histogram ends at twice the 99.9 % quantile, so one outlier does not cost all resolution;
* few values get fewer bins, else each lies alone in its bin and nothing is ever clipped; with
  less than 8 values for each level there is no distribution to compare, and nothing is clipped;
* a candidate that leaves Q = 0 where P > 0 has infinite divergence and never wins, nor does one that clips most values
  (values far from zero: with the lowest of them alone P and Q would be the same).

It ignores the size of errors and covers too much at 4 bits and below; above 10 bits a level is finer
than a bin and the range of the data is returned.

Reference: Migacz, "8-bit inference with TensorRT", GTC 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.native.statistics import statistics_kernels
from lq_plugin.ranges.estimators.percentile import quantile
from lq_plugin.ranges.magnitudes import Folded, clips_negative, clips_positive, fold
from lq_plugin.ranges.registry import register_range
from lq_plugin.ranges.sample import Sample

BINS = 2048
#: Above this many levels on [0, t] nothing is searched.
MOST_LEVELS = 512
#: The histogram ends at this multiple of this quantile of the magnitudes.
TAIL_QUANTILE, TAIL_FACTOR = 0.999, 2.0
#: Values for each bin and for each level, at least, when there are few.
VALUES_EACH = 8
#: Divergences that differ by less are the same.
TIE = 1e-12
_CHUNK = 2**16


@register_range("kl", RANGES["kl"])
def kl(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns bounds at the threshold of least KL divergence; around the mean where the grid has a zero point.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: none is taken.
    """
    folded = fold(sample, grid)
    threshold = folded.limit.double()
    for levels in folded.levels.unique().tolist():
        few = sample.edges is None and sample.values.shape[1] < VALUES_EACH * levels
        if levels > MOST_LEVELS or few:
            continue
        rows = (folded.levels == levels) & (folded.total() > 0)
        if bool(rows.any()):
            threshold[rows] = _thresholds(folded.select(rows), int(levels))
    return folded.bounds(threshold)


def _thresholds(folded: Folded, levels: int) -> Tensor:
    end = TAIL_FACTOR * quantile(folded.magnitude, folded.mass, TAIL_QUANTILE)
    end = torch.minimum(end, folded.limit).double()
    bins = BINS
    if folded.sample.edges is None:
        while bins > 4 * levels and bins * VALUES_EACH > folded.magnitude.shape[1]:
            bins //= 2
    counts = kl_histogram(folded, end, bins)
    beyond = (folded.total() - counts.sum(1)).clamp(min=0.0)
    # Rounding of the sums is no outlier.
    beyond = torch.where(beyond > 1e-6 * counts.sum(1), beyond, 0.0)
    return (best_bin(counts, beyond, levels) + 0.5) * end / bins


def best_bin(counts: Tensor, beyond: Tensor, levels: int) -> Tensor:
    """Returns the number of bins to keep, `levels..bins`, with the least divergence; the last on a tie.

    Args:
        counts: float64 `[rows, bins]`.
        beyond: mass above the histogram, `[rows]`.
        levels: levels that the kept bins are merged into.

    Returns:
        int64 `[rows]`.
    """
    if (native := statistics_kernels(counts)) is not None:
        return native.least_divergence(counts, beyond, levels)
    kept = torch.arange(levels, counts.shape[1] + 1, device=counts.device).unsqueeze(0)
    divergence = Divergence(counts, beyond, levels).at(kept)
    least = divergence.amin(dim=1, keepdim=True)
    return kept.where(divergence <= least + TIE, 0).amax(dim=1)


class Divergence:
    """KL(P || Q) times the number of values, in two parts, for numbers of kept bins `[rows or 1, k]`."""

    def __init__(self, counts: Tensor, beyond: Tensor, levels: int) -> None:
        self.counts, self.levels = counts, levels
        self.own = torch.xlogy(counts, counts)
        self.cumulated, self.occupied, self.entropy = (_prefix(v) for v in (counts, (counts > 0).double(), self.own))
        self.total = self.cumulated[:, -1:] + beyond.unsqueeze(1)

    def at(self, kept: Tensor) -> Tensor:
        """Returns KL(P || Q) itself, float64 `[rows, k]`."""
        return (self.of_merging(kept) + self.of_clipping(kept)) / self.total

    def of_merging(self, kept: Tensor) -> Tensor:
        """Returns the part that comes of spreading each level evenly over its bins, float64 `[rows, k]`."""
        level = torch.arange(self.levels + 1, device=kept.device)
        parts = []
        for part in kept.split(max(_CHUNK // (self.levels * len(self.counts)), 1), dim=1):
            merged, spread_over = self._merged(self._begin(part.unsqueeze(2), level))
            parts.append(torch.xlogy(merged, merged / spread_over).sum(2))
        return _at(self.entropy, kept) - torch.cat(parts, dim=1)

    def of_clipping(self, kept: Tensor) -> Tensor:
        """Returns the part that comes of the outliers, which are in the last bin of P and not in Q, `[rows, k]`.

        Infinite where that bin is empty or most values are outliers.
        """
        inside, last = _at(self.cumulated, kept), _at(self.counts, kept - 1)
        outliers = self.total - inside
        merged, spread_over = self._merged(torch.stack([self._begin(kept, self.levels - 1), kept], dim=2))
        lost = torch.xlogy(outliers, (merged / spread_over).squeeze(2).clamp(min=1e-300))
        lost += self.total * torch.log(self.total / inside.clamp(min=1e-300))
        both = last + outliers
        added = torch.xlogy(both, both) - _at(self.own, kept - 1)
        return (added - lost).masked_fill(((outliers > 0) & (last == 0)) | (inside < outliers), torch.inf)

    def _begin(self, kept: Tensor, level: Tensor | int) -> Tensor:
        """Returns the first bin of a level: bin j belongs to level floor(j * levels / kept)."""
        return -(-kept * level).div(self.levels, rounding_mode="floor")

    def _merged(self, begins: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mass and number of non-empty bins (at least 1) between neighbours of `begins [rows or 1, k, n]`."""
        mass, bins = (
            _at(of, begins.flatten(1)).unflatten(1, begins.shape[1:]).diff(dim=2)
            for of in (self.cumulated, self.occupied)
        )
        return mass, bins.clamp_(min=1.0)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Returns `values [rows, n]` at `index [rows or 1, k]`."""
    return values[:, index[0]] if len(index) == 1 else values.gather(1, index)


def kl_histogram(folded: Folded, end: Tensor, bins: int) -> Tensor:
    """Returns the mass of the magnitudes in equal bins, float64 `[rows, bins]`.

    Args:
        folded: the magnitudes.
        end: the upper end of the last bin, `[rows]`.
        bins: their number.
    """
    sample = folded.sample
    if sample.edges is None:
        magnitude, rows = folded.magnitude.double(), sample.rows
        index = (magnitude * (bins / end.clamp(min=1e-300)).unsqueeze(1)).long()
        # The largest value, at the end itself, belongs to the last bin; values beyond to one that is dropped.
        index = index.clamp_(max=bins - 1).masked_fill_(magnitude > end.unsqueeze(1), bins)
        index += torch.arange(rows, device=index.device).unsqueeze(1) * (bins + 1)
        mass = None if folded.mass is None else folded.mass.double().flatten()
        counts = torch.bincount(index.flatten(), mass, minlength=rows * (bins + 1))
        return counts.view(rows, bins + 1)[:, :-1].double()
    at = end.unsqueeze(1) * torch.linspace(-1.0, 1.0, 2 * bins + 1, device=end.device, dtype=torch.float64)
    mass = _cumulated(sample, folded.centre.double().unsqueeze(1) + at).diff(dim=1).clamp_(min=0.0)
    below, above = mass[:, :bins].flip(1), mass[:, bins:]
    if clips_negative(folded.grid):
        return above
    return below if clips_positive(folded.grid) else below + above


def _cumulated(sample: Sample, at: Tensor) -> Tensor:
    """Mass of the histogram bins below `at [rows, k]`, linear within a bin."""
    assert sample.edges is not None
    edges = sample.edges.double()
    bins = edges.shape[1] - 1
    # The mass up to an edge belongs to it; between two edges the numbers interpolate.
    cumulated = _prefix(sample.weights()[:, :bins].double())
    index = torch.searchsorted(edges, at, right=True).sub_(1).clamp_(0, bins - 1)
    (low, high), (before, after) = (tuple(of.gather(1, index + side) for side in (0, 1)) for of in (edges, cumulated))
    share = ((at - low) / (high - low).clamp_(min=1e-300)).clamp_(0.0, 1.0)
    return before.addcmul_(share, after - before)


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
