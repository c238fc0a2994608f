"""`minmax` and `ema`: the smallest and largest value."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.magnitudes import clips_negative, clips_positive
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample


@register_range("minmax", RANGES["minmax"])
def minmax(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Exact bounds of the data; nothing is clipped, except the side an unsigned grid (or `int1`) has not."""
    return as_bounds(*_extremes(sample, grid))


@register_range("ema", RANGES["ema"])
def ema(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """The same: a `Sample` has no batches to average over; a quantizer that trains has."""
    return as_bounds(*_extremes(sample, grid))


def _extremes(sample: Sample, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    low = torch.zeros_like(sample.minimum) if clips_negative(grid) else sample.minimum
    high = torch.zeros_like(sample.maximum) if clips_positive(grid) else sample.maximum
    return low, high
