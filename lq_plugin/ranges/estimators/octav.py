"""`octav`: Newton iteration on the clipping error.

Minimises J(s) = (4^-b / 3) s^2 P(0 < |x| <= s) + E[(|x| - s)^2; |x| > s] by

    s <- sum(|x|; |x| > s) / ( (4^-b / 3) #(0 < |x| <= s) + #(|x| > s) ),

4^-b / 12 for an unsigned grid. No histogram, no search: every row converges in about ten steps.

Reference: Sakr, Dai, Venkatesan, Zimmer, Dally, Khailany, "Optimal Clipping and Magnitude-aware
Differentiation for Improved Quantization-aware Training", ICML 2022 (arXiv 2206.06501).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.magnitudes import Folded, bit_width, fold
from lq_plugin.ranges.ordered import Ordered
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample

#: The paper needs at most 10; heavy tails need more.
MAX_ITERATIONS = 32
TOLERANCE = 1e-6


@register_range("octav", RANGES["octav"])
def octav(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns bounds at the fixed point of the iteration, started from the mean magnitude, never above the largest.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: none is taken.

    With a zero point and data on both sides, both bounds move: with the noise of 2^b levels on
    [l, h], h <- (sum(x; x > h) + k l N) / (#(x > h) + k N), k = 4^-b / 12, N = #(l <= x <= h), and
    the mirror image for l. Equal sides give the formula above, l = 0 the unsigned one.
    """
    folded = fold(sample, grid)
    threshold = torch.zeros_like(folded.limit)
    for threshold in newton_iterates(folded):  # noqa: B007 - the last one is wanted
        pass
    low, high = folded.bounds(threshold)
    if grid.affine and not bool(folded.one_sided.all()):
        two_low, two_high = _two_bounds(sample, grid)
        low = torch.where(folded.one_sided, low, two_low)
        high = torch.where(folded.one_sided, high, two_high)
    return as_bounds(low, high)


def newton_iterates(folded: Folded) -> Iterator[Tensor]:
    """Yields thresholds `[rows]`, float64, from the start to the fixed point."""
    ordered = Ordered(folded.magnitude, folded.sample.mass)
    noise = 1.0 / (12.0 * folded.levels.double().square())
    count = folded.total()
    # The paper starts from the maximum, where nothing is clipped and the first step is this mean.
    s = folded.mean()
    yield s
    for _ in range(MAX_ITERATIONS):
        clipped, total = ordered.above(s.float())
        step = total / (noise * (count - clipped) + clipped).clamp(min=1e-300)
        # Nothing is clipped at s (a constant row): stay.
        following = torch.where(clipped > 0, step, s)
        settled = bool(((following - s).abs() <= TOLERANCE * s).all())
        s = following
        yield s
        if settled:
            return


def _two_bounds(sample: Sample, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    x, ordered = sample.values, Ordered(sample.values, sample.mass)
    k = 4.0 ** -bit_width(grid) / 12.0
    mean = sample.average(x)
    spread = sample.average((x - mean.float().unsqueeze(1)).abs())
    minimum, maximum = sample.minimum.double(), sample.maximum.double()
    count = ((x != 0) * sample.weights()).sum(dim=1, dtype=torch.float64)
    low = torch.maximum(mean - spread, minimum).clamp(max=0.0)
    high = torch.minimum(mean + spread, maximum).clamp(min=0.0)
    for _ in range(2 * MAX_ITERATIONS):
        (n_above, above), (n_below, below) = ordered.above(high.float()), ordered.below(low.float())
        inside = k * (count - n_above - n_below)
        new_high = (above + inside * low) / (n_above + inside).clamp(min=1e-300)
        new_low = (below + inside * high) / (n_below + inside).clamp(min=1e-300)
        # A side that clips nothing stays; bounds keep zero between them.
        new_high = torch.where(n_above > 0, torch.minimum(new_high, maximum), high).clamp(min=0.0)
        new_low = torch.where(n_below > 0, torch.maximum(new_low, minimum), low).clamp(max=0.0)
        moved = torch.maximum((new_high - high).abs(), (new_low - low).abs())
        settled = bool((moved <= TOLERANCE * (high - low)).all())
        low, high = new_low, new_high
        if settled:
            break
    return low, high
