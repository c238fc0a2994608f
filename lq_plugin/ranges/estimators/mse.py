"""`mse`: the clipping range with the least squared error on the real grid.

The error is measured, not modelled: every candidate that may be the best rounds and clips the sample
(`grid_error`). It has many local minima at low bit-widths, so the search sweeps before it refines.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log

import torch
from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE, bounds_from_qparams, qparams_from_bounds, zero_point_from
from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.estimators.minmax import minmax
from lq_plugin.ranges.grid_error import clipping_error, mean_squared_error
from lq_plugin.ranges.magnitudes import fold
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample

#: Candidates of the sweep, and of each refinement around the best. The error of exact values has
#: more local minima than that of a histogram.
SWEEP_VALUES, REFINE_VALUES = 64, (17, 9)
SWEEP_BINS, REFINE_BINS = 48, (9, 7)
#: Candidates for each of a pair of bounds.
SWEEP_2D = 10
REFINE_2D = (5, 5, 5)
#: The sweep goes down to this share of the mean magnitude, but not below `LOWEST` of the largest.
OF_MEAN = 0.25
LOWEST = 2.0**-12
#: With few values the best scale may put the highest level above the data, by half a step at most;
#: beyond this factor it never pays.
HIGHEST = 1.1
#: Candidates of a sweep between two looks at what clipping alone costs; of a small sample as many as make this many
#: elements.
_AT_ONCE, _ELEMENTS = 8, 2**17
#: Rounding of the errors compared there.
_ROUNDING = 1e-4
#: Multiples of a coarse scale that are tried on each side of the nearest one: all of them with 4 bits.
MULTIPLES = 15
_BLOCK = 2**18


@register_range("mse", RANGES["mse"])
def mse(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns the bounds of the levels with the least mean squared error.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: none is taken.

    One scale is searched, down to a quarter of the mean magnitude and up to where the highest
    level lies half a step above the data (that takes 1 % off the error of groups of 16 at 4 bits).
    With a zero point and data on both sides, both bounds are searched, within the data.
    """
    two_sided = (sample.minimum < 0) & (sample.maximum > 0)
    if not grid.affine or not bool(two_sided.any()):
        return as_bounds(*_one_scale(sample, grid))
    if bool(two_sided.all()):
        return as_bounds(*_two_bounds(sample, grid))
    low, high = torch.empty_like(sample.minimum), torch.empty_like(sample.maximum)
    for rows, search in ((~two_sided, _one_scale), (two_sided, _two_bounds)):
        low[rows], high[rows] = search(sample.select(rows), grid)
    return as_bounds(low, high)


def best_multiples(
    sample: Sample, minimum: Tensor, scale: Tensor, coarse: Tensor, most: int, grid: IntegerGrid
) -> Tensor:
    """Returns the multiple of a coarse scale with the least squared error for each row, float32 `[rows]`.

    These are the grids that two-level scales really have.

    Args:
        sample: the values.
        minimum: lower bounds, for zero points, `[rows]`.
        scale: what the rows would have without a coarse scale, `[rows]`: multiples near it are tried.
        coarse: the coarse scale, `[rows]`.
        most: the largest multiple.
        grid: the integer levels.

    Returns:
        Integers in 1..most, float32 `[rows]`.
    """
    found = []
    step = max(_BLOCK // sample.values.shape[1], 1)
    for first in range(0, sample.rows, step):
        rows = slice(first, first + step)
        nearest = (scale[rows] / coarse[rows]).round().clamp(1, most)
        tried = (nearest.unsqueeze(1) + torch.arange(-MULTIPLES, MULTIPLES + 1, device=scale.device)).clamp(1, most)
        scales = tried * coarse[rows].unsqueeze(1)
        zero_point = zero_point_from(minimum[rows].clamp(max=0.0).unsqueeze(1), scales, grid)
        best = mean_squared_error(sample.select(rows), scales, zero_point, grid).argmin(dim=1, keepdim=True)
        found.append(tried.gather(1, best).squeeze(1))
    return torch.cat(found)


def _one_scale(sample: Sample, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    widest_low, widest_high = minmax(sample, grid)
    folded = fold(sample, grid)
    lowest = (OF_MEAN * folded.mean().float() / folded.limit.clamp(min=MIN_SCALE)).clamp(LOWEST, 0.5)
    reach = max(grid.quant_max, -grid.quant_min) if not grid.affine else grid.levels - 1
    highest = log(min(reach / (reach - 0.5), HIGHEST))
    sweep, refine = (SWEEP_VALUES, REFINE_VALUES) if sample.edges is None else (SWEEP_BINS, REFINE_BINS)
    step = (highest - lowest.log()) / (sweep - 1)

    def swept(at: Tensor) -> Tensor:
        """Shares of the widest bounds at some places, the first of which is the range of the data itself.

        It is the only one without error for a constant row.
        """
        return torch.where(at == 0, 0.0, highest - step.unsqueeze(1) * (at - 1)).clamp(max=highest).exp()

    def qparams(share: Tensor) -> tuple[Tensor, Tensor]:
        return qparams_from_bounds(share * widest_low.unsqueeze(1), share * widest_high.unsqueeze(1), grid)

    error = _descending_errors(sample, lambda at: qparams(swept(at)), sweep + 1, grid)
    best = swept(error.argmin(dim=1, keepdim=True)).log().squeeze(1)
    for candidates in refine:
        shift = step.unsqueeze(1) * torch.linspace(-1.0, 1.0, candidates, device=step.device)
        step = step * 2.0 / (candidates - 1)
        share = (best.unsqueeze(1) + shift).clamp(max=highest).exp()
        error = mean_squared_error(sample, *qparams(share), grid)
        best = share.gather(1, error.argmin(dim=1, keepdim=True)).log().squeeze(1)
    share = best.exp()
    scale, _ = qparams_from_bounds(share * widest_low, share * widest_high, grid)
    low, high = share * widest_low, share * widest_high
    if grid.signed and not grid.affine:
        # Both bounds of the levels, as far as the row reaches.
        low, high = scale * grid.quant_min, scale * grid.quant_max
        low = torch.where(sample.minimum >= 0, torch.zeros_like(low), low)
        high = torch.where(sample.maximum <= 0, torch.zeros_like(high), high)
    return low, high


def _descending_errors(
    sample: Sample, qparams: Callable[[Tensor], tuple[Tensor, Tensor]], count: int, grid: IntegerGrid
) -> Tensor:
    """Returns `mean_squared_error` of scales that fall from the second one on, infinite where it is not the least.

    The smaller the scale, the more is clipped. Once clipping alone costs every row as much as the least error so far,
    nothing that follows is better: half of a sweep, as a rule.

    Args:
        sample: the values.
        qparams: of places in 0..count - 1, int64 `[1, places]`: scales and zero points, `[rows, places]`.
        count: number of scales.
        grid: the integer levels.
    """
    error = torch.full((sample.rows, count), inf, dtype=torch.float64, device=sample.values.device)
    at_once = max(_ELEMENTS // sample.values.numel(), _AT_ONCE)
    places = torch.arange(count, device=sample.values.device).unsqueeze(0)
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        scale, zero_point = qparams(places[:, part])
        if first:
            least = clipping_error(sample, scale[:, 0], zero_point[:, 0], grid)
            if bool((least * (1.0 - _ROUNDING) >= error.amin(dim=1)).all()):
                break
        error[:, part] = mean_squared_error(sample, scale, zero_point, grid)
    return error


def _two_bounds(sample: Sample, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    rows = torch.arange(sample.rows, device=sample.values.device)
    deviation = sample.average((sample.values - sample.average(sample.values).float().unsqueeze(1)).abs()).float()
    reach = (sample.maximum - sample.minimum).clamp(min=MIN_SCALE)
    lowest = (OF_MEAN * deviation / reach).clamp(LOWEST, 0.5)
    step = -lowest.log() / (SWEEP_2D - 1)
    best = torch.zeros(sample.rows, 2, device=step.device)
    chosen = best
    for candidates in (SWEEP_2D, *REFINE_2D):
        if candidates == SWEEP_2D:
            axis = -step.unsqueeze(1) * torch.arange(candidates, device=step.device)
        else:
            axis = step.unsqueeze(1) * torch.linspace(-1.0, 1.0, candidates, device=step.device)
            step = step * 2.0 / (candidates - 1)
        shift = torch.stack([axis.repeat_interleave(candidates, dim=1), axis.repeat(1, candidates)], dim=2)
        share = (best.unsqueeze(1) + shift).clamp(max=0.0).exp()
        scale, zero_point = qparams_from_bounds(
            share[..., 0] * sample.minimum.unsqueeze(1), share[..., 1] * sample.maximum.unsqueeze(1), grid
        )
        error = mean_squared_error(sample, scale, zero_point, grid)
        winner = error.argmin(dim=1)
        best = share[rows, winner].log()
        chosen = torch.stack(bounds_from_qparams(scale[rows, winner], zero_point[rows, winner], grid), dim=1)
    return chosen[:, 0], chosen[:, 1]
