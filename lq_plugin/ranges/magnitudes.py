"""One threshold instead of two bounds: magnitudes around a centre.

Threshold methods (percentile, KL, ACIQ, OCTAV) look for one number t >= 0. What it clips depends
on the grid and on the row:

| grid | row | magnitude y | levels on [0, t] | bounds |
|---|---|---|---|---|
| signed, no zero point | any | abs(x) | 2^(b-1) | -t, t * quant_max / abs(quant_min) |
| signed, no zero point | one side of zero | abs(x) | 2^(b-1) | 0, t or -t, 0 |
| unsigned, no zero point | any | x where x > 0; the rest is clipped | 2^b | 0, t |
| -1..0 (`int1`) | any | -x where x < 0; the rest is clipped | 1 | -t, 0 |
| affine | one side of zero | abs(x) | 2^b | 0, t or -t, 0 |
| affine | both sides | abs(x - mean) | 2^(b-1) | mean - t, mean + t, within the data |

Exact zeros have their own level on every grid and carry no information about t, so they do not
count among the magnitudes (except around a mean).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.ranges.registry import as_bounds
from lq_plugin.ranges.sample import Sample


@dataclass(frozen=True, eq=False)
class Folded:
    """Magnitudes of a sample as a grid sees them.

    Attributes:
        magnitude: y >= 0, `[rows, n]`.
        mass: `[rows, n]`, 0 for elements that do not count; None is one each.
        limit: largest magnitude, `[rows]`; no threshold needs to be above.
        levels: number of levels on [0, t], `[rows]`.
        one_sided: the row lies on one side of zero, bool `[rows]`.
        centre: what magnitudes are measured from, `[rows]`.
    """

    sample: Sample
    grid: IntegerGrid
    magnitude: Tensor
    mass: Tensor | None
    limit: Tensor
    levels: Tensor
    one_sided: Tensor
    centre: Tensor

    def select(self, rows: Tensor) -> Folded:
        """Returns the rows of a bool mask; without a copy if these are all rows."""
        if bool(rows.all()):
            return self
        mass = None if self.mass is None else self.mass[rows]
        of_rows = (value[rows] for value in (self.limit, self.levels, self.one_sided, self.centre))
        return Folded(self.sample.select(rows), self.grid, self.magnitude[rows], mass, *of_rows)

    def total(self) -> Tensor:
        """Returns the number of elements that count, float64 `[rows]`."""
        if self.mass is None:
            return torch.full_like(self.limit, self.magnitude.shape[1], dtype=torch.float64)
        return self.mass.sum(dim=1, dtype=torch.float64)

    def mean(self) -> Tensor:
        """Returns the mean magnitude, float64 `[rows]`; 0 for a row where nothing counts."""
        if self.mass is None:
            return self.magnitude.mean(dim=1, dtype=torch.float64)
        return (self.magnitude * self.mass).sum(dim=1, dtype=torch.float64) / self.total().clamp(min=1e-300)

    def root_mean_square(self) -> Tensor:
        """Returns the root mean square magnitude, float64 `[rows]`; 0 for a row where nothing counts."""
        if self.mass is None:
            y: Tensor = (
                torch.linalg.vector_norm(self.magnitude, dim=1, dtype=torch.float64) / self.magnitude.shape[1] ** 0.5
            )
            return y
        squares = self.magnitude.double().square_().mul_(self.mass)
        return (squares.sum(dim=1) / self.total().clamp(min=1e-300)).sqrt()

    def bounds(self, threshold: Tensor, both_sides_covered: bool = False) -> tuple[Tensor, Tensor]:
        """Returns bounds whose scale clips at `threshold [rows]`, never above `limit`.

        A grid like -8..7 has no level at +t when its lowest is at -t; by default it is scaled
        for -t, as a formula for 2^b levels means it. `both_sides_covered` scales it for what the
        data has within -t..t.
        """
        sample, grid = self.sample, self.grid
        t = torch.minimum(threshold.to(self.limit), self.limit)
        low, high = -t, t
        if grid.affine:
            around = ~self.one_sided
            low = torch.where(around, torch.maximum(self.centre - t, sample.minimum), low)
            high = torch.where(around, torch.minimum(self.centre + t, sample.maximum), high)
        elif both_sides_covered:
            low, high = torch.maximum(low, sample.minimum), torch.minimum(high, sample.maximum)
        elif grid.signed:
            high = torch.where(self.one_sided, high, t * (grid.quant_max / -grid.quant_min))
        if clips_negative(grid):
            low = torch.zeros_like(t)
        if clips_positive(grid):
            high = torch.zeros_like(t)
        low = torch.where(self.one_sided & (sample.minimum >= 0), 0.0, low)
        high = torch.where(self.one_sided & (sample.maximum <= 0), 0.0, high)
        return as_bounds(low, high)


def fold(sample: Sample, grid: IntegerGrid) -> Folded:
    """Returns the magnitudes of `sample` for `grid`, by the table in the module's docstring."""
    x, mass = sample.values, sample.mass
    one_sided = (sample.minimum >= 0) | (sample.maximum <= 0)
    limit = sample.reach()
    centre = torch.zeros_like(limit)
    half = 2.0 ** (bit_width(grid) - 1)
    if clips_negative(grid):
        magnitude = x.clamp(min=0.0)
        limit = sample.maximum.clamp(min=0.0)
        one_sided = torch.ones_like(one_sided)
        levels = torch.full_like(limit, 2 * half)
    elif clips_positive(grid):
        magnitude = x.clamp(max=0.0).neg()
        limit = sample.minimum.clamp(max=0.0).neg()
        one_sided = torch.ones_like(one_sided)
        levels = torch.full_like(limit, half)
    elif grid.affine:
        centre = torch.where(one_sided, 0.0, sample.average(x)).float()
        magnitude = (x - centre.unsqueeze(1)).abs()
        limit = torch.maximum(sample.maximum - centre, centre - sample.minimum)
        levels = torch.where(one_sided, 2 * half, half)
    else:
        magnitude = x.abs()
        levels = torch.full_like(limit, half)
    # Few weights are exactly zero, and to find that out takes a tenth of the time of the mask.
    if mass is not None or bool(((magnitude.amin(dim=1) == 0) & (centre == 0)).any()):
        mass = sample.weights().masked_fill((magnitude == 0) & (centre == 0).unsqueeze(1), 0.0)
    return Folded(sample, grid, magnitude, mass, limit, levels, one_sided, centre)


def bit_width(grid: IntegerGrid) -> int:
    """Returns the bits of a grid; a narrow range of 2^b - 1 levels has b.

    >>> bit_width(IntegerGrid(-7, 7)), bit_width(IntegerGrid(0, 15))
    (4, 4)
    """
    return (grid.levels - 1).bit_length()


def clips_negative(grid: IntegerGrid) -> bool:
    """Returns True if no level stands for a negative value."""
    return not grid.affine and grid.quant_min >= 0


def clips_positive(grid: IntegerGrid) -> bool:
    """Returns True if no level stands for a positive value."""
    return not grid.affine and grid.quant_max <= 0
