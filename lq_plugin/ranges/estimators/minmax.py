"""`minmax`, `ema` and `dynamic`: the smallest and largest value."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.magnitudes import clips_negative, clips_positive
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample


@register_range("dynamic", RANGES["dynamic"])
@register_range("ema", RANGES["ema"])
@register_range("minmax", RANGES["minmax"])
def minmax(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns the exact bounds of the data; only the side that an unsigned grid (or `int1`) lacks is clipped.

    A `Sample` has no batches that `ema` could average over, as a quantizer in training has, and to `dynamic` it is the
    tensor itself.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: the momentum of `ema`, which only training uses.
    """
    low = torch.zeros_like(sample.minimum) if clips_negative(grid) else sample.minimum
    high = torch.zeros_like(sample.maximum) if clips_positive(grid) else sample.maximum
    return as_bounds(low, high)
