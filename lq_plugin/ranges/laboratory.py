"""The clipping laboratory: every estimator on one sample, predicted and measured.

A row of the table has the bounds that an estimator chose, the error that the fitted distribution predicts for them,
the error measured on the sample, and whether that is the smallest.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, log10

import torch
from torch import Tensor

from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.intent.ranges import RANGES, range_kind
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.ranges.distributions import FittedDistributions, fit_distributions
from lq_plugin.ranges.grid_error import clipped_share, mean_squared_error
from lq_plugin.ranges.registry import estimate_range, registered_ranges
from lq_plugin.ranges.sample import Sample

#: The library's own estimators that are compared unless named otherwise (`ema` equals `minmax` on one sample).
COMPARED = tuple(name for name in RANGES if range_kind(name).compared)


@dataclass(frozen=True)
class RangeEntry:
    """One estimator on one row, or on all rows together (`row` is None).

    Over all rows the bounds are the outermost ones, errors and shares the means over the elements.

    Attributes:
        range: the estimator, with its option.
        row: channel or group, None for all.
        minimum, maximum: where it clips.
        predicted_mse: mean squared error if the values followed the fitted distribution.
        measured_mse: mean squared error on the sample.
        sqnr_db: signal to quantization noise, 10 log10(E[x^2] / measured_mse).
        clipped: share of the elements rounded to a level outside the grid.
        distribution: `"gauss"` or `"laplace"`, the likelier; over all rows the more frequent.
        wins: smallest measured error; the first on a tie.
    """

    range: str
    row: int | None
    minimum: float
    maximum: float
    predicted_mse: float
    measured_mse: float
    sqnr_db: float
    clipped: float
    distribution: str
    wins: bool


@dataclass(frozen=True, eq=False)
class RangeTable:
    """The results of every estimator on one sample.

    Attributes:
        grid: the levels.
        ranges: names of the estimators, in order.
        bounds: name to `(minimum [rows], maximum [rows])`.
        predicted_mse, measured_mse, clipped: `[len(ranges), rows]`, float64.
        power: E[x^2] of each row, float64 `[rows]`.
        elements: number of elements of each row, `[rows]`.
        fitted: the fitted distributions.
    """

    grid: IntegerGrid
    ranges: list[str]
    bounds: dict[str, tuple[Tensor, Tensor]]
    predicted_mse: Tensor
    measured_mse: Tensor
    clipped: Tensor
    power: Tensor
    elements: Tensor
    fitted: FittedDistributions

    @property
    def fit(self) -> FittedDistributions:
        """The former name of `fitted`."""
        warnings.warn("RangeTable.fit is RangeTable.fitted now", DeprecationWarning, stacklevel=2)
        return self.fitted

    @property
    def best(self) -> str:
        """The estimator with the smallest measured error over all rows."""
        return self.ranges[int(self._mean(self.measured_mse).argmin())]

    @property
    def distribution(self) -> str:
        """The distribution that is the likelier one of most rows."""
        return Counter(self.fitted.names()).most_common(1)[0][0]

    def entries(self) -> list[RangeEntry]:
        """Returns one entry per estimator, over all rows."""
        predicted, measured, clipped = (
            self._mean(v).tolist() for v in (self.predicted_mse, self.measured_mse, self.clipped)
        )
        power = float(self._mean(self.power.unsqueeze(0)))
        return [
            RangeEntry(
                name,
                None,
                float(self.bounds[name][0].min()),
                float(self.bounds[name][1].max()),
                predicted[k],
                measured[k],
                _decibel(power, measured[k]),
                clipped[k],
                self.distribution,
                name == self.best,
            )
            for k, name in enumerate(self.ranges)
        ]

    def row_entries(self) -> list[RangeEntry]:
        """Returns one entry for each row and estimator, row by row."""
        winners = self.measured_mse.argmin(dim=0).tolist()
        predicted, measured, clipped = (v.T.tolist() for v in (self.predicted_mse, self.measured_mse, self.clipped))
        power, distributions = self.power.tolist(), self.fitted.names()
        low = torch.stack([self.bounds[name][0] for name in self.ranges], dim=1).tolist()
        high = torch.stack([self.bounds[name][1] for name in self.ranges], dim=1).tolist()
        return [
            RangeEntry(
                name,
                row,
                low[row][k],
                high[row][k],
                predicted[row][k],
                measured[row][k],
                _decibel(power[row], measured[row][k]),
                clipped[row][k],
                distributions[row],
                k == winners[row],
            )
            for row in range(len(winners))
            for k, name in enumerate(self.ranges)
        ]

    def records(self, per_row: bool = False) -> list[dict[str, str | int | float | bool | None]]:
        """Returns the entries as plain dictionaries, for a table, a CSV file or a logger."""
        return [asdict(entry) for entry in (self.row_entries() if per_row else self.entries())]

    def _mean(self, of: Tensor) -> Tensor:
        return (of * self.elements).sum(dim=1) / self.elements.sum()


def compare_ranges(
    sample: Sample, grid: QuantSpec | IntegerGrid | str, ranges: Iterable[str] | None = None
) -> RangeTable:
    """Runs estimators on one sample and measures each.

    Args:
        sample: the values.
        grid: the levels, or a spec that has them.
        ranges: estimators, with options where wanted; None: all registered ones that are to be compared, those of the
            library in the order of `COMPARED`.

    Raises:
        SpecError: unknown estimator or option.

    >>> sample = Sample.from_tensor(torch.linspace(-1, 1, 64).pow(5).unsqueeze(0))
    >>> table = compare_ranges(sample, "int4")
    >>> table.best, len(table.entries())
    ('mse', 7)
    """
    levels = grid if isinstance(grid, IntegerGrid) else QuantSpec.parse(grid).grid
    compared = [name for name in RANGES if range_kind(name).compared and name in registered_ranges()]
    names = compared if ranges is None else list(ranges)
    bounds = {name: estimate_range(name, sample, levels) for name in names}
    # Errors on the normalized sample cannot overflow; they scale with its square.
    normal, factor = sample.normalized()
    fitted = fit_distributions(normal)
    predicted, measured, clipped = [], [], []
    for low, high in bounds.values():
        scale, zero_point = qparams_from_bounds(low / factor, high / factor, levels)
        predicted.append(fitted.expected_mse(scale, zero_point, levels))
        measured.append(mean_squared_error(normal, scale.unsqueeze(1), zero_point.unsqueeze(1), levels).squeeze(1))
        clipped.append(clipped_share(normal, scale, zero_point, levels))
    square = factor.double().square()
    return RangeTable(
        levels,
        names,
        bounds,
        torch.stack(predicted) * square,
        torch.stack(measured).clamp(min=0.0) * square,
        torch.stack(clipped),
        normal.average(normal.values.double().square()) * square,
        sample.total(),
        fitted,
    )


def _decibel(power: float, noise: float) -> float:
    if noise <= 0.0:
        return inf
    return 10.0 * log10(power / noise) if power > 0.0 else -inf
