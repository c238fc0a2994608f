"""`percentile`: quantiles of the values.

Quantiles interpolate linearly between order statistics, as numpy's do; a value of mass m counts
as m equal elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.magnitudes import fold
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample

#: Share of the values that is kept without an option, in percent.
DEFAULT_PERCENTILE = 99.99


@register_range("percentile", RANGES["percentile"])
def percentile(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns bounds that keep `option` percent of the values (default 99.99), zeros among them.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: percent of the values, 50..100.

    With a zero point and data on both sides, half of the rest is cut at each end. Without, it is the
    quantile of abs(x) (signed grid) or of max(x, 0) (unsigned grid), covered on both sides.
    """
    share = (DEFAULT_PERCENTILE if option is None else float(option)) / 100.0
    folded = fold(sample, grid)
    threshold = quantile(folded.magnitude, sample.mass, share)
    low, high = folded.bounds(threshold, both_sides_covered=True)
    if grid.affine and not bool(folded.one_sided.all()):
        two_sided_low = quantile(sample.values, sample.mass, (1 - share) / 2)
        two_sided_high = quantile(sample.values, sample.mass, (1 + share) / 2)
        low = torch.where(folded.one_sided, low, torch.maximum(two_sided_low, sample.minimum))
        high = torch.where(folded.one_sided, high, torch.minimum(two_sided_high, sample.maximum))
    return as_bounds(low, high)


def quantile(values: Tensor, mass: Tensor | None, share: float) -> Tensor:
    """Returns the weighted quantile of each row, float32 `[rows]`.

    Args:
        values: `[rows, n]`.
        mass: elements that each value stands for, `[rows, n]`; None: one each.
        share: 0..1.

    >>> quantile(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2.0, 1.0, 1.0]]), 0.5)
    tensor([1.5000])
    """
    return _order_statistics(values, share) if mass is None else _weighted(values, mass, share)


def _order_statistics(values: Tensor, share: float) -> Tensor:
    n = values.shape[1]
    position = share * (n - 1)
    rank = int(position)
    # Both order statistics stand at the nearer end: no need to sort everything.
    if n - rank < rank + 2:
        end = values.topk(n - rank, dim=1).values
        low, high = end[:, -1], end[:, max(n - rank - 2, 0)]
    else:
        end = values.topk(min(rank + 2, n), dim=1, largest=False).values
        low, high = end[:, rank], end[:, min(rank + 1, n - 1)]
    return (low.double() + (high.double() - low.double()) * (position - rank)).float()


def _weighted(values: Tensor, mass: Tensor, share: float) -> Tensor:
    ordered, order = values.sort(dim=1)
    mass = mass.gather(1, order)
    reached = mass.cumsum(dim=1, dtype=torch.float64)
    position = share * (reached[:, -1:] - 1.0).clamp(min=0.0)
    rank = position.floor()
    # Element k (counted from 0) is the first value with more than k elements up to it.
    last = (mass > 0).long().mul(torch.arange(values.shape[1], device=values.device)).amax(dim=1, keepdim=True)
    below = torch.searchsorted(reached, rank, right=True).minimum(last)
    above = torch.searchsorted(reached, rank + 1.0, right=True).minimum(last)
    low, high = ordered.gather(1, below).double(), ordered.gather(1, above).double()
    return (low + (high - low) * (position - rank)).float().squeeze(1)
