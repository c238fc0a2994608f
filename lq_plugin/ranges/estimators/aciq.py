"""`aciq` and `aciq_exact`: analytic clipping for Gauss and Laplace.

`aciq` is the paper's: with 2^M bins of width 2 alpha / 2^M on [-alpha, alpha] the error is

    Laplace(b):    2 b^2 exp(-alpha / b) + alpha^2 / (3 * 4^M)
    Gauss(sigma):  (alpha^2 + sigma^2)(1 - erf(alpha / sqrt(2) sigma))
                   - sqrt(2 / pi) alpha sigma exp(-alpha^2 / 2 sigma^2) + alpha^2 / (3 * 4^M)

minimal at alpha = b W(3 * 4^M) (Lambert W) and at a root. On one side of zero the bins are half as
wide, so M + 1 takes the place of M. Those bins have no level at zero: a real grid has, and with 2 or 3
bits the constants are off (34 % more error at 2 bits, Gauss, levels -1..1). `aciq_exact` minimizes
the true error of the grid that is used.

The predicted errors do not tell which distribution fits: Gauss predicts the smaller error even for values that are
exactly Laplace (24 dB where 35 are possible at 8 bits), and the authors' code takes Gauss then. This one measures both
thresholds on the data and takes the one with the smaller error.

Reference: Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", NeurIPS 2019 (arXiv 1810.05723), eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import erfc, exp, log, pi, sqrt

import torch
from torch import Tensor

from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.intent.spec import RANGES, IntegerGrid
from lq_plugin.ranges.distributions import DISTRIBUTIONS, expected_error
from lq_plugin.ranges.estimators.minmax import minmax
from lq_plugin.ranges.grid_error import mean_squared_error
from lq_plugin.ranges.magnitudes import Folded, bit_width, clips_negative, fold
from lq_plugin.ranges.registry import as_bounds, register_range
from lq_plugin.ranges.sample import Sample


@register_range("aciq", RANGES["aciq"])
def aciq(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns bounds at the paper's threshold, for Gauss or Laplace, whichever has the smaller error on the sample.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: `"gauss"` or `"laplace"` forces one.

    Spreads: mean absolute and root mean square deviation, from zero on a grid without zero point,
    from the mean otherwise; of a one-sided row, those of its values that are not zero. The
    threshold never exceeds the data.
    """
    folded = fold(sample, grid)

    def bounds(name: str) -> tuple[Tensor, Tensor]:
        spread = _spread(folded, name)
        threshold = torch.empty_like(spread)
        for levels in folded.levels.unique().tolist():
            rows = folded.levels == levels
            # M of the formula: one bit more than the levels on [0, t] have.
            threshold[rows] = aciq_threshold(name, int(levels).bit_length()) * spread[rows]
        return folded.bounds(threshold)

    return _least_error(sample, grid, _names(option), bounds)


@register_range("aciq_exact", RANGES["aciq_exact"])
def aciq_exact(sample: Sample, grid: IntegerGrid, option: str | None = None) -> tuple[Tensor, Tensor]:
    """Returns bounds of the scale with the least expected error on the real grid, for Gauss or Laplace as in `aciq`.

    Args:
        sample: the normalized values of each row.
        grid: the levels they are rounded to.
        option: `"gauss"` or `"laplace"` forces one.

    Spreads as for `aciq`. A grid with a zero point around a mean is taken to have a level there.
    """
    folded = fold(sample, grid)
    half = 2 ** bit_width(grid) // 2
    around = IntegerGrid(-half, half - 1) if grid.affine else IntegerGrid(grid.quant_min, grid.quant_max)
    above = grid.levels - 1 if grid.affine else grid.quant_max
    below = grid.levels - 1 if grid.affine else -grid.quant_min
    upward = folded.one_sided & (sample.minimum >= 0) | clips_negative(grid)
    widest, _ = qparams_from_bounds(*minmax(sample, grid), grid)

    def bounds(name: str) -> tuple[Tensor, Tensor]:
        spread = _spread(folded, name)
        scale = torch.zeros_like(spread)
        for rows, levels, one_sided in (
            (~folded.one_sided, around, False),
            (upward, IntegerGrid(0, above), True),
            (folded.one_sided & ~upward, IntegerGrid(0, below), True),
        ):
            if levels.levels > 1 and bool(rows.any()):
                scale[rows] = exact_scale(name, levels.quant_min, levels.quant_max, one_sided) * spread[rows]
        scale = torch.minimum(scale.float(), widest)
        if not grid.affine:
            low = torch.where(upward, 0.0, scale * grid.quant_min)
            return low, torch.where(folded.one_sided & ~upward, 0.0, scale * grid.quant_max)
        reach = scale * (grid.levels - 1)
        mean_low = torch.maximum(folded.centre - reach / 2, sample.minimum)
        mean_high = torch.minimum(folded.centre + reach / 2, sample.maximum)
        low = torch.where(folded.one_sided, torch.where(upward, 0.0, -reach), mean_low)
        return low, torch.where(folded.one_sided, torch.where(upward, reach, 0.0), mean_high)

    return _least_error(sample, grid, _names(option), bounds)


@lru_cache(maxsize=256)
def aciq_threshold(name: str, bits: int) -> float:
    """Returns alpha / b (Laplace) or alpha / sigma (Gauss) for 2^bits bins on [-alpha, alpha].

    >>> round(aciq_threshold("laplace", 4), 4), round(aciq_threshold("gauss", 4), 4)
    (5.0286, 2.5591)
    """
    target = 3.0 * 4.0**bits
    if name == "laplace":
        # Newton on w + log w = log target, whose root is W(target); convex, so it cannot overshoot twice.
        w = log(target)
        for _ in range(64):
            w -= (w + log(w) - log(target)) / (1.0 + 1.0 / w)
        return w
    # d/d alpha: alpha / (3 * 4^M) = 2 (phi(alpha) - alpha Q(alpha)); the difference falls monotonically.
    low, high = 0.0, 40.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        clipping = exp(-0.5 * middle**2) / sqrt(2.0 * pi) - middle * 0.5 * erfc(middle / sqrt(2.0))
        low, high = (middle, high) if 2.0 * clipping > middle / target else (low, middle)
    return 0.5 * (low + high)


@lru_cache(maxsize=256)
def exact_scale(name: str, quant_min: int, quant_max: int, one_sided: bool = False) -> float:
    """Returns the scale with the least error of levels `quant_min..quant_max` on spread 1, with zero at level 0.

    Args:
        name: `"gauss"` or `"laplace"`.
        quant_min, quant_max: outermost levels.
        one_sided: of the distribution of |X|.

    >>> round(7 * exact_scale("laplace", -7, 7), 4), round(8 * exact_scale("gauss", -8, 7), 4)
    (4.8199, 2.7089)
    """
    levels = quant_max - quant_min + 1
    reach = max(quant_max, -quant_min)

    def errors(scales: Tensor) -> Tensor:
        return expected_error(name, scales, scales * quant_max, levels, one_sided)

    low, high = log(0.05 / reach), log(60.0 / reach)
    # A few rounds of a fine sweep around the best: no assumption on the shape beyond the first one.
    for _ in range(6):
        scales = torch.linspace(low, high, 129, dtype=torch.float64).exp()
        best = int(errors(scales).argmin())
        step = (high - low) / 128
        middle = low + best * step
        low, high = middle - step, middle + step
    return exp(middle)


def _spread(folded: Folded, name: str) -> Tensor:
    return folded.mean() if name == "laplace" else folded.root_mean_square()


def _names(option: str | None) -> tuple[str, ...]:
    """Returns the distributions to try."""
    return DISTRIBUTIONS if option is None else (option,)


def _least_error(
    sample: Sample, grid: IntegerGrid, names: tuple[str, ...], bounds: Callable[[str], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns the bounds, among those of the distributions, with the smallest squared error on each row."""
    low, high = (torch.stack(of, dim=1) for of in zip(*(as_bounds(*bounds(name)) for name in names), strict=True))
    if len(names) == 1:
        return low[:, 0], high[:, 0]
    best = mean_squared_error(sample, *qparams_from_bounds(low, high, grid), grid).argmin(dim=1, keepdim=True)
    return low.gather(1, best).squeeze(1), high.gather(1, best).squeeze(1)
