"""`lsq` and `pact`: the start of learned ranges.

References: Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153), section 2.1; Bhalgat et
al., "LSQ+", CVPRW 2020 (arXiv 2004.09576); Choi et al., "PACT", 2018 (arXiv 1805.06085), section 3.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from lq_plugin.errors import SpecError
from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample


@register_range("lsq", RANGES["lsq"])
def lsq(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns the first step size, 2 E|x| / sqrt(quant_max), as the bounds of the levels.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: `"rounded"`, which only the gradient depends on.

    With a zero point, as in LSQ+: the levels span -a..a with a = max(|mean - 3 std|, |mean + 3 std|),
    within the data, so 0..a for a row above zero.

    Raises:
        SpecError: the grid has no positive level.
    """
    x = sample.values
    if grid.affine:
        mean = sample.average(x)
        std = sample.average((x - mean.float().unsqueeze(1)).square()).sqrt()
        a = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()).float()
        return as_bounds(torch.maximum(-a, sample.minimum), torch.minimum(a, sample.maximum))
    if grid.quant_max <= 0:
        raise SpecError(f"range 'lsq' needs a positive level, got {grid.quant_min}..{grid.quant_max}")
    scale = (2.0 * sample.average(x.abs()) / sqrt(grid.quant_max)).float()
    return as_bounds(scale * grid.quant_min, scale * grid.quant_max)


@register_range("pact", RANGES["pact"])
def pact(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns 0 and the largest value as the first bounds; the paper's fixed start (8 or 10) ignores the data.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: none is taken.
    """
    return as_bounds(torch.zeros_like(sample.maximum), sample.maximum)
