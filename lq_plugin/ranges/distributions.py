"""Gauss and Laplace fitted to a sample, and the expected error of a grid on the likelier of the two.

Everything is in closed form. With levels l_0 < ... < l_L, spaced s, and t_j the midpoints between
neighbours, rounding to the nearest level has the error

    E[(X - Q(X))^2] = E[(X - l_L)^2] - 2 s sum_j E[max(t_j - X, 0)]

(summation by parts over the cells), clipping included. The one-sided distributions are those of
|X|: half-normal and exponential, the values a ReLU lets through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import e, pi, sqrt

import torch
from torch import Tensor

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.ranges.sample import Sample
from lq_plugin.utilities.moved import former_names

__getattr__ = former_names(__name__)

DISTRIBUTIONS = ("gauss", "laplace")
#: Laplace is the likelier of the two below this ratio of mean absolute to standard deviation
#: (0.707 for Laplace, 0.798 for Gauss): log 2eb < log(2 pi e sigma^2) / 2.
LAPLACE_BELOW = sqrt(pi / (2.0 * e))
_ROOT_2_PI = sqrt(2.0 / pi)
_CELLS = 2**20


@dataclass(frozen=True, eq=False)
class FittedDistributions:
    """Both distributions fitted to each row by maximum likelihood. All tensors `[rows]`, float64.

    Attributes:
        one_sided: the row lies on one side of zero; the distributions are those of its values that are not zero.
        mirrored: that side is below zero.
        centre: the mean, or 0 for a one-sided row.
        laplace_spread: b, the mean absolute deviation from the centre.
        gauss_spread: sigma, the root mean square deviation from the centre.
        share: of the elements, those that the distributions describe; the rest is exactly zero.
    """

    one_sided: Tensor
    mirrored: Tensor
    centre: Tensor
    laplace_spread: Tensor
    gauss_spread: Tensor
    share: Tensor

    @property
    def prefers_laplace(self) -> Tensor:
        """True where Laplace has the larger likelihood, bool `[rows]`."""
        return self.laplace_spread < LAPLACE_BELOW * self.gauss_spread

    def names(self) -> list[str]:
        """Returns `"gauss"` or `"laplace"` for each row, by likelihood."""
        return [DISTRIBUTIONS[int(flag)] for flag in self.prefers_laplace]

    def expected_mse(self, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
        """Returns the mean squared error that the likelier distribution predicts, `[rows]`.

        Args:
            scale, zero_point: of the grid, `[rows]`.
            grid: the levels.
        """
        scale, zero_point = scale.double(), zero_point.double()
        # The grid as the distribution sees it: from its centre, on its own side of zero.
        lowest, highest = (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale
        top = torch.where(self.mirrored, -lowest, highest) - self.centre
        mse = torch.empty_like(top)
        for one_sided in (False, True):
            for name, spread in (("gauss", self.gauss_spread), ("laplace", self.laplace_spread)):
                rows = (self.one_sided == one_sided) & (self.prefers_laplace == (name == "laplace"))
                if bool(rows.any()):
                    width = spread[rows].clamp(min=1e-150)
                    error = expected_error(name, scale[rows] / width, top[rows] / width, grid.levels, one_sided)
                    mse[rows] = error * width.square()
        return mse.clamp(min=0.0) * self.share


def fit_distributions(sample: Sample) -> FittedDistributions:
    """Fits Gauss and Laplace to each row; one-sided rows by the values that are not zero."""
    x, mass = sample.values, sample.weights().double()
    one_sided = (sample.minimum >= 0) | (sample.maximum <= 0)
    # Zeros are an atom of their own (ReLU, pruning) unless the centre is a mean.
    described = mass.masked_fill(one_sided.unsqueeze(1) & (x == 0), 0.0)
    count = described.sum(1).clamp(min=1e-300)
    mean = (x * described).sum(1) / count
    centre = torch.where(one_sided, 0.0, mean)
    deviation = x.double() - centre.unsqueeze(1)
    laplace = (deviation.abs() * described).sum(1) / count
    gauss = ((deviation.square() * described).sum(1) / count).sqrt()
    share = described.sum(1) / mass.sum(1).clamp(min=1e-300)
    return FittedDistributions(
        one_sided, one_sided & (sample.maximum <= 0) & (sample.minimum < 0), centre, laplace, gauss, share
    )


def expected_error(name: str, scale: Tensor, top: Tensor, levels: int, one_sided: bool = False) -> Tensor:
    """Returns the mean squared error of a grid on a distribution of spread 1 around 0.

    Args:
        name: `"gauss"` (sigma = 1) or `"laplace"` (b = 1).
        scale: distance of levels, float64 `[rows]`.
        top: the highest level, `[rows]`; the others lie below it.
        levels: how many.
        one_sided: the distribution of |X| instead of X.

    Returns:
        float64 `[rows]`.
    """
    hinge, second_moment = _MOMENTS[name, one_sided]
    total = torch.zeros_like(top)
    step = max(_CELLS // max(top.numel(), 1), 1)
    for first in range(0, levels - 1, step):
        below = torch.arange(first, min(first + step, levels - 1), device=top.device, dtype=top.dtype) + 0.5
        total += hinge(top.unsqueeze(-1) - below * scale.unsqueeze(-1)).sum(-1)
    return second_moment(top) - 2.0 * scale * total


# E[max(t - X, 0)] and E[(X - l)^2] of the four distributions.


def _gauss_hinge(t: Tensor) -> Tensor:
    y: Tensor = t * torch.special.ndtr(t) + torch.exp(-0.5 * t * t) / sqrt(2.0 * pi)
    return y


def _laplace_hinge(t: Tensor) -> Tensor:
    return t.clamp(min=0.0) + 0.5 * torch.exp(-t.abs())


def _half_normal_hinge(t: Tensor) -> Tensor:
    t = t.clamp(min=0.0)
    return 2.0 * _gauss_hinge(t) - t - _ROOT_2_PI


def _exponential_hinge(t: Tensor) -> Tensor:
    t = t.clamp(min=0.0)
    return t + torch.expm1(-t)


_Moment = Callable[[Tensor], Tensor]
_MOMENTS: dict[tuple[str, bool], tuple[_Moment, _Moment]] = {
    ("gauss", False): (_gauss_hinge, lambda level: 1.0 + level * level),
    ("laplace", False): (_laplace_hinge, lambda level: 2.0 + level * level),
    ("gauss", True): (_half_normal_hinge, lambda level: 1.0 - 2.0 * _ROOT_2_PI * level + level * level),
    ("laplace", True): (_exponential_hinge, lambda level: 2.0 - 2.0 * level + level * level),
}
