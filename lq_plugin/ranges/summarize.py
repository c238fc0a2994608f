"""The sample of a tensor of any size: its values, or a histogram of them where they are many."""

from __future__ import annotations

from torch import Tensor

from lq_plugin.ranges.histogram import Histogram
from lq_plugin.ranges.sample import Sample

#: Rows with more elements than this are summarized by a histogram.
MAX_POINTS = 2**16


def summarize(x: Tensor, mask: Tensor | None = None, name: str = "tensor", max_points: int = MAX_POINTS) -> Sample:
    """Returns the sample that ranges of a tensor are estimated on.

    Args:
        x: floating point `[rows, n]`; a row is a channel or a group.
        mask: bool `[rows, n]`, True for real elements; padding never enters. A masked tensor is never summarized.
        name: what error messages call the tensor.
        max_points: longer rows become a histogram of all their elements, whose bins are less than 1 % of the value
            wide (`Histogram`).

    Raises:
        CalibrationError: see `Sample.from_tensor`.
    """
    if mask is not None or x.dim() != 2 or x.shape[1] <= max_points:
        return Sample.from_tensor(x, mask, name)
    histogram = Histogram(rows=x.shape[0], max_samples=None, name=name)
    histogram.update(x.detach().float())
    return histogram.sample()
