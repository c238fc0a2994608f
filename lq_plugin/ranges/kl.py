"""`kl`: the threshold whose quantized histogram diverges least from the original (TensorRT).

For a threshold at bin i, P is the histogram up to there with everything beyond added to its last
bin, Q the same bins without the outliers, merged into as many levels as the grid has on [0, t], each
spread evenly over its bins that are not empty. The i with the least KL(P || Q) wins, the largest on a
tie; the threshold is (i + 1/2) bin widths. With prefix sums one i costs as much as there are levels.

What departs from the slides, and why:
* exact zeros are left out (they are exact on every grid; kept, they make a ReLU output collapse);
* the search starts at as many bins as levels, not at 128, which is a constant for 8 bits;
* the histogram ends at twice the 99.9 % quantile, so one outlier does not cost all resolution;
* few values get fewer bins, else each lies alone in its bin and nothing is ever clipped; with
  less than 8 values for each level there is no distribution to compare, and nothing is clipped;
* a candidate that leaves Q = 0 where P > 0 has infinite divergence and never wins.

It ignores the size of errors and covers too much at 4 bits and below; above 10 bits a level is finer
than a bin and the range of the data is returned.

Reference: Migacz, "8-bit inference with TensorRT", GTC 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.ranges.folding import Folded, clips_negative, clips_positive, fold
from lq_plugin.ranges.percentile import quantile
from lq_plugin.ranges.registry import no_option, register_range
from lq_plugin.ranges.sample import Sample
from lq_plugin.spec import RANGES, IntegerGrid

BINS = 2048
#: Above this many levels on [0, t] nothing is searched.
MOST_LEVELS = 512
#: The histogram ends at this multiple of this quantile of the magnitudes.
TAIL_QUANTILE, TAIL_FACTOR = 0.999, 2.0
#: Values for each bin and for each level, at least, when there are few.
VALUES_EACH = 8
#: Thresholds tried before the neighbourhood of the best is searched bin by bin.
_CANDIDATES = 64
_CHUNK = 2**20


@register_range("kl", RANGES["kl"])
def kl(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Bounds at the threshold of least KL divergence; around the mean where the grid has a zero point."""
    no_option("kl", option)
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
    counts = _histogram(folded, end, bins)
    beyond = (folded.total() - counts.sum(1)).clamp(min=0.0)
    # Rounding of the sums is no outlier.
    beyond = torch.where(beyond > 1e-6 * counts.sum(1), beyond, 0.0)
    stride = max((bins - levels) // _CANDIDATES, 1)
    first = torch.arange(bins, levels - 1, -stride, device=counts.device).flip(0)
    best = best_bin(counts, beyond, levels, first.expand(counts.shape[0], -1))
    if stride > 1:
        near = best.unsqueeze(1) + torch.arange(-stride + 1, stride, device=counts.device)
        best = best_bin(counts, beyond, levels, near.clamp(levels, bins))
    return (best + 0.5) * end / bins


def best_bin(counts: Tensor, beyond: Tensor, levels: int, candidates: Tensor) -> Tensor:
    """Number of bins to keep, among `candidates`, with the least divergence; the last on a tie.

    Args:
        counts: float64 `[rows, bins]`.
        beyond: mass above the histogram, `[rows]`.
        levels: levels that the kept bins are merged into.
        candidates: int64 `[rows, k]`, ascending, `levels..bins`.

    Returns:
        int64 `[rows]`.
    """
    parts = []
    for part in candidates.split(max(_CHUNK // (levels * counts.shape[0]), 1), dim=1):
        parts.append(_divergence(counts, beyond, levels, part))
    divergence = torch.cat(parts, dim=1)
    last = divergence.shape[1] - 1 - divergence.flip(1).argmin(dim=1, keepdim=True)
    return candidates.gather(1, last).squeeze(1)


def _divergence(counts: Tensor, beyond: Tensor, levels: int, kept: Tensor) -> Tensor:
    """KL(P || Q) for each number of kept bins, float64 `[rows, k]`."""
    cumulated, occupied, entropy = (_prefix(v) for v in (counts, (counts > 0).double(), torch.xlogy(counts, counts)))
    # Bin j belongs to level floor(j * levels / kept): level k begins at bin ceil(k * kept / levels).
    begins = -(-kept.unsqueeze(2) * torch.arange(levels + 1, device=kept.device)).div(levels, rounding_mode="floor")
    flat = begins.flatten(1)
    merged = cumulated.gather(1, flat).view(begins.shape).diff(dim=2)
    spread_over = occupied.gather(1, flat).view(begins.shape).diff(dim=2)
    quantized = torch.xlogy(merged, merged / spread_over.clamp(min=1.0)).sum(2)

    inside = cumulated.gather(1, kept)
    total = cumulated[:, -1:] + beyond.unsqueeze(1)
    outliers = total - inside
    last = counts.gather(1, kept - 1)
    original = entropy.gather(1, kept) - torch.xlogy(last, last) + torch.xlogy(last + outliers, last + outliers)
    level_of_last = (merged[:, :, -1] / spread_over[:, :, -1].clamp(min=1.0)).clamp(min=1e-300)
    quantized = quantized + torch.xlogy(outliers, level_of_last)
    divergence = (original - quantized) / total - torch.log(total / inside.clamp(min=1e-300))
    return divergence.masked_fill(((outliers > 0) & (last == 0)) | (inside == 0), torch.inf)


def _histogram(folded: Folded, end: Tensor, bins: int) -> Tensor:
    """Mass of the magnitudes in `bins` equal bins on [0, end], float64 `[rows, bins]`."""
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
    at = end.unsqueeze(1) * torch.linspace(0.0, 1.0, bins + 1, device=end.device, dtype=torch.float64)
    centre = folded.centre.double().unsqueeze(1)
    above = _cumulated(sample, centre + at).diff(dim=1)
    below = -_cumulated(sample, centre - at).diff(dim=1)
    if clips_negative(folded.grid):
        return above.clamp_(min=0.0)
    if clips_positive(folded.grid):
        return below.clamp_(min=0.0)
    return (above + below).clamp_(min=0.0)


def _cumulated(sample: Sample, at: Tensor) -> Tensor:
    """Mass of the histogram bins below `at [rows, k]`, linear within a bin."""
    assert sample.edges is not None
    edges = sample.edges.double()
    bins = edges.shape[1] - 1
    cumulated = _prefix(sample.weights()[:, :bins].double())
    index = torch.searchsorted(edges, at.contiguous(), right=True).sub_(1).clamp_(0, bins - 1)
    low, high = edges.gather(1, index), edges.gather(1, index + 1)
    share = ((at - low) / (high - low).clamp(min=1e-300)).clamp_(0.0, 1.0)
    return cumulated.gather(1, index) + share * sample.weights().double().gather(1, index)


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
