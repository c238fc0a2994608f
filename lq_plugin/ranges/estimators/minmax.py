"""`minmax`, `ema` and `dynamic`: the smallest and largest value."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.magnitudes import clips_negative, clips_positive
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample


@register_range("minmax", RANGES["minmax"])
def minmax(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns the exact bounds of the data; only the side that an unsigned grid (or `int1`) lacks is clipped.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: none is taken.
    """
    return as_bounds(*_extremes(sample, grid))


@register_range("ema", RANGES["ema"])
def ema(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns the bounds of `minmax`: a `Sample` has no batches to average over; a quantizer in training has.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: the momentum, which only training uses.
    """
    return as_bounds(*_extremes(sample, grid))


@register_range("dynamic", RANGES["dynamic"])
def dynamic(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns the bounds of `minmax`: those of the tensor that the sample was taken from.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: none is taken.
    """
    return as_bounds(*_extremes(sample, grid))


def _extremes(sample: Sample, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    low = torch.zeros_like(sample.minimum) if clips_negative(grid) else sample.minimum
    high = torch.zeros_like(sample.maximum) if clips_positive(grid) else sample.maximum
    return low, high
