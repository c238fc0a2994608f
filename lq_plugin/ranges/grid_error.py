"""Squared error of a `Sample` on a grid, for many candidate scales at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.functional.affine import bounds_from_qparams
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import ops
from lq_plugin.native.kernels import Kernels
from lq_plugin.ranges.magnitudes import clips_negative, clips_positive
from lq_plugin.ranges.sample import Sample

#: Elements of a temporary; larger ones leave the cache and run at half the speed.
_CHUNK = 2**17


def mean_squared_error(sample: Sample, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Returns the mean of (x - x̂)^2 of each row, rounded and clipped as `fake_quantize` does it.

    Exact values are quantized one by one in float32. In a histogram bin the mass is spread evenly,
    and the error is integrated: with t = x / s, q the level of t and r = t - q, the antiderivative of
    r^2 is q / 12 + r^3 / 3, inside and outside the range alike. So bins may be wider than a level.

    Args:
        sample: `rows` distributions.
        scale, zero_point: float32 `[rows, candidates]`.
        grid: the integer levels.

    Returns:
        float64 `[rows, candidates]`.
    """
    if (kernels := _kernels(sample)) is not None:
        zeros = None if not grid.affine else zero_point.float().contiguous()
        bounds = grid.quant_min, grid.quant_max
        return kernels.grid_errors(sample.values.contiguous(), scale.float().contiguous(), zeros, bounds)
    bins = 0 if sample.edges is None else sample.edges.shape[1] - 1
    total = torch.zeros(scale.shape, dtype=torch.float64, device=scale.device)
    low, high = grid.quant_min - zero_point, grid.quant_max - zero_point
    if sample.edges is not None:
        knots, jumps = _knots(sample.edges, sample.weights()[:, :bins])
        for part in _candidates(scale.shape[1], sample.rows * knots.shape[1]):
            total[:, part] += _binned_error(knots, jumps, scale[:, part].double(), low[:, part], high[:, part])
    if sample.values.shape[1] > bins:
        points = sample.values[:, bins:]
        mass = None if sample.mass is None else sample.mass[:, bins:]
        # Zero is always a level, so the zeros that a histogram usually counts separately have no error.
        if sample.edges is None or bool((points != 0).any()):
            total += _point_errors(points, mass, scale, low, high)
    return total / sample.total().clamp(min=1e-300).unsqueeze(1)


def clipping_error(sample: Sample, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Returns a lower bound of the error: the mean squared distance to the range of the levels, float64 `[rows]`.

    In a histogram bin the distance is that of the middle; squared distances are convex, so their mean over the bin is
    no less.

    Args:
        scale, zero_point: `[rows]`.
    """
    if (kernels := _kernels(sample)) is not None:
        of_each = scale.float().contiguous().unsqueeze(1), zero_point.float().contiguous().unsqueeze(1)
        return kernels.grid_errors(
            sample.values.contiguous(), *of_each, (grid.quant_min, grid.quant_max), rounded=False
        ).squeeze(1)
    low, high = bounds_from_qparams(scale, zero_point, grid)
    inside = _clip(sample.values.unsqueeze(1).clone(), low.unsqueeze(1), high.unsqueeze(1)).squeeze(1)
    return sample.average(inside.sub_(sample.values).square_())


def clipped_share(sample: Sample, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Returns the share of the elements that round to a level outside the grid, float64 `[rows]`.

    Args:
        scale, zero_point: `[rows]`.
    """
    q = (sample.values * scale.reciprocal().unsqueeze(1)).round() + zero_point.unsqueeze(1)
    return sample.average(((q < grid.quant_min) | (q > grid.quant_max)).float())


def side_without_levels(sample: Sample, scale: Tensor, grid: IntegerGrid) -> float:
    """Returns the share of the elements on a side of zero without levels, except those that round to zero anyway.

    Args:
        scale: `[rows]`.
    """
    if not (clips_negative(grid) or clips_positive(grid)):
        return 0.0
    q = (sample.values / scale.unsqueeze(1)).round()
    missed = sample.average((q < 0 if clips_negative(grid) else q > 0).float())
    total = sample.total()
    return float((missed * total).sum() / total.sum())


def _candidates(count: int, elements_each: int) -> list[slice]:
    step = max(_CHUNK // max(elements_each, 1), 1)
    return [slice(first, first + step) for first in range(0, count, step)]


def _kernels(sample: Sample) -> Kernels | None:
    """Returns the kernels that may compute errors of a sample: of exact values, each once."""
    if sample.edges is not None or sample.mass is not None or sample.values.dtype != torch.float32:
        return None
    found = ops.kernels_for(sample.values)
    return found if isinstance(found, Kernels) else None


def _point_errors(points: Tensor, mass: Tensor | None, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    parts = _candidates(scale.shape[1], points.numel())
    return torch.cat([_point_error(points, mass, scale[:, p], low[:, p], high[:, p]) for p in parts], dim=1)


def _point_error(points: Tensor, mass: Tensor | None, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    t = points.unsqueeze(1) * scale.reciprocal().unsqueeze(2)
    q = _clip(t.round(), low, high)
    squares = q.sub_(t).square_()
    if mass is None:
        # As the kernels sum, so that they choose the same candidate.
        summed = squares.sum(2, dtype=torch.float64)
    else:
        summed = torch.matmul(squares, mass.to(squares).unsqueeze(2)).squeeze(2).double()
    return summed * scale.double().square()


def _clip(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clips `q [rows, candidates, n]` to `low` and `high [rows, candidates]`, in place."""
    # `clamp_` between two tensors that broadcast is not vectorized: five times the time of these two.
    torch.maximum(q, low.unsqueeze(2), out=q)
    return torch.minimum(q, high.unsqueeze(2), out=q)


def _knots(edges: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the edges and the change of the density at each, float64 `[rows, bins + 1]`.

    Summation by parts: sum_j d_j (G(e_{j+1}) - G(e_j)) = sum_k (d_{k-1} - d_k) G(e_k).
    """
    edges = edges.double()
    # A bin without width holds no density; exact bounds may shrink one to a point, kept as a sliver.
    width = torch.maximum(edges.diff(dim=1), edges[:, 1:].abs() * 2.0**-20).clamp(min=1e-30)
    density = torch.where(mass > 0, mass.double() / width, 0.0)
    sliver = (width > edges.diff(dim=1)) & (mass > 0)
    if bool(sliver.any()):
        # Its left edge moves instead of its right one: it belongs to the last bin.
        return (
            torch.cat([edges[:, 1:] - width, edges[:, 1:]], dim=1),
            torch.cat([-density, density], dim=1),
        )
    jumps = torch.zeros_like(edges)
    jumps[:, 1:] += density
    jumps[:, :-1] -= density
    return edges, jumps


def _binned_error(knots: Tensor, jumps: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    t = knots.unsqueeze(1) * scale.reciprocal().unsqueeze(2)
    q = _clip(t.round(), low.double(), high.double())
    r = t.sub_(q)
    primitive = (r * r).mul_(r).mul_(1.0 / 3.0).add_(q, alpha=1.0 / 12.0)
    return torch.matmul(primitive, jumps.unsqueeze(2)).squeeze(2) * scale.pow(3)
