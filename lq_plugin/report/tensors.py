"""Views of a tensor's values on its levels: histogram, clipping bounds of every estimator, and their criteria."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.functional.grouping import blocks
from lq_plugin.intent.spec import IntegerGrid, PerGroup, PerMatrix, QuantSpec
from lq_plugin.layers import QuantizedLayer
from lq_plugin.quantizers import ActivationQuantizer
from lq_plugin.ranges import Histogram, Sample, compare_ranges, summarize
from lq_plugin.ranges.estimators.kl import MOST_LEVELS, VALUES_EACH, Divergence, kl_histogram
from lq_plugin.ranges.estimators.percentile import quantile
from lq_plugin.ranges.grid_error import clipped_share, mean_squared_error
from lq_plugin.ranges.magnitudes import fold
from lq_plugin.report.data import Curve, Mark, TensorView, digits
from lq_plugin.report.weights import in_force, original, quantized

BINS = 96
#: Thresholds of a curve.
POINTS = 48
#: More levels than this are a continuum to the eye.
MAX_LEVELS = 256
#: Bins of the histogram that the divergence is computed on; a curve needs no more.
_KL_BINS = 1024


def activation_view(quantizer: ActivationQuantizer, histogram: Histogram, slot: str) -> TensorView:
    """Returns a view of an activation from its statistics; per channel: of the channel that reaches furthest.

    Args:
        quantizer: with its range.
        histogram: the statistics of its tensor.
        slot: `input` or `output`.
    """
    sample = histogram.sample()
    row = int(sample.reach().argmax())
    what = "whole tensor" if sample.rows == 1 else f"channel {row} of {sample.rows}"
    one = _on_cpu(sample.row(row))
    spec = quantizer.spec
    if not spec.has_grid:
        return _view(slot, spec, what, one, [], [])
    if spec.dynamic:
        return _grid_view(slot, spec, what, one, None)
    ready = quantizer.is_calibrated and not isinstance(spec.granularity, PerGroup)
    qparams = tuple(
        value.detach().float().cpu().reshape(-1)[row if len(value) > 1 else 0] for value in quantizer.qparams()
    )
    return _grid_view(slot, spec, what, one, qparams if ready else None)  # type: ignore[arg-type]


def weight_view(layer: QuantizedLayer, before: Tensor | None = None) -> TensorView | None:
    """Returns a view of a layer's weight, or of the output channel that reaches furthest where channels have scales."""
    quantizer = in_force(layer)
    if quantizer is None:
        return None
    weight = original(layer, before)
    spec: QuantSpec = quantizer.spec
    if spec.is_uniform and not isinstance(spec.granularity, PerGroup):
        grouped = blocks(type(layer).canonical(layer, layer.weight).detach().float(), spec.granularity)
        scale, zero_point = (value.detach().float().cpu().reshape(-1) for value in quantizer.qparams(grouped))
        # One part for each scale: rows, matrices of a stack, or the whole.
        parts = blocks(weight, spec.granularity) if isinstance(spec.granularity, PerMatrix) else weight
        row = int(parts.flatten(1).abs().amax(1).argmax()) if len(scale) > 1 else 0
        part = parts[row] if len(scale) > 1 else weight
        kind = "matrix" if isinstance(spec.granularity, PerMatrix) else "channel"
        what = f"{kind} {row} of {len(parts)}" if len(scale) > 1 else "whole tensor"
        return _grid_view("weight", spec, what, summarize(part.reshape(1, -1)), (scale[row], zero_point[row]))
    row = int(weight.flatten(1).abs().amax(1).argmax())
    sample = summarize(weight[row].reshape(1, -1))
    return _view("weight", spec, f"channel {row} of {len(weight)}", sample, _used(quantized(layer)[row]), [])


def _grid_view(
    slot: str, spec: QuantSpec, what: str, sample: Sample, qparams: tuple[Tensor, Tensor] | None
) -> TensorView:
    """Returns a view with bounds, levels and curves; `sample` has one row."""
    grid = spec.grid
    table = compare_ranges(sample, grid)
    marks = [
        Mark(e.range, digits(e.minimum), digits(e.maximum), digits(e.sqnr_db), digits(e.clipped, 3), e.wins)
        for e in table.entries()
    ]
    levels: list[float] = []
    if qparams is not None:
        scale, zero_point = (value.reshape(1) for value in qparams)
        marks.append(_in_force(sample, scale, zero_point, grid))
        if grid.levels <= MAX_LEVELS:
            whole = torch.arange(grid.quant_min, grid.quant_max + 1)
            levels = [digits(value) for value in ((whole - zero_point) * scale).tolist()]
    return _view(
        slot, spec, what, sample, levels, marks, mse_curve(sample, grid), kl_curve(sample, grid), table.distribution
    )


def _view(
    slot: str,
    spec: QuantSpec,
    what: str,
    sample: Sample,
    levels: list[float],
    marks: list[Mark],
    mse: Curve | None = None,
    kl: Curve | None = None,
    distribution: str = "",
) -> TensorView:
    low, high, counts, zeros = binned(sample)
    return TensorView(slot, str(spec), what, low, high, counts, zeros, levels, marks, mse, kl, distribution)


def _in_force(sample: Sample, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Mark:
    low, high = (float(((bound - zero_point) * scale)[0]) for bound in (grid.quant_min, grid.quant_max))
    normal, factor = sample.normalized()
    square = factor.double().square()
    error = (
        mean_squared_error(normal, (scale / factor).unsqueeze(1), zero_point.unsqueeze(1), grid)[0, 0].clamp(min=0.0)
        * square[0]
    )
    power = float((normal.average(normal.values.double().square()) * square)[0])
    sqnr = float("inf") if float(error) == 0 else 10 * float(np.log10(max(power, 1e-300) / float(error)))
    clipped = float(clipped_share(normal, scale / factor, zero_point, grid)[0])
    return Mark("in force", digits(low), digits(high), digits(sqnr), digits(clipped, 3))


def binned(sample: Sample, bins: int = BINS) -> tuple[float, float, list[float], float]:
    """Returns `(low, high, counts, zeros)` of a sample with one row, see `Sample.bars`."""
    edges, counts, zeros = sample.bars(bins)
    return digits(edges[0]), digits(edges[-1]), [digits(count, 3) for count in counts], digits(zeros, 3)


def mse_curve(sample: Sample, grid: IntegerGrid, points: int = POINTS) -> Curve:
    """Returns the mean squared error over the upper clipping bound, or the lower one where nothing is positive.

    Both bounds shrink together.

    Args:
        sample: with one row.
        grid: of integers.
        points: number of bounds.
    """
    normal, factor = sample.normalized()
    share = torch.linspace(0.02, 1.26, points)
    low, high = normal.minimum.clamp(max=0.0) * share, normal.maximum.clamp(min=0.0) * share
    scale, zero_point = qparams_from_bounds(low, high, grid)
    error = (
        mean_squared_error(normal, scale.unsqueeze(0), zero_point.unsqueeze(0), grid)[0].clamp(min=0.0)
        * factor.double().square()
    )
    bound = high if float(normal.maximum) > 0 else low
    pairs = sorted(zip((bound * factor).tolist(), error.tolist(), strict=True))
    return Curve([digits(x) for x, _ in pairs], [digits(y) for _, y in pairs])


def kl_curve(sample: Sample, grid: IntegerGrid, points: int = POINTS) -> Curve | None:
    """Returns the KL divergence over the same bound; None where the estimator does not search.

    It is the divergence of the quantized histogram that `lq_plugin.ranges.estimators.kl` measures.

    Args:
        sample: with one row.
        grid: of integers.
        points: number of bounds.
    """
    normal, factor = sample.normalized()
    folded = fold(normal, grid)
    levels = int(folded.levels[0])
    bins, few = _KL_BINS, sample.edges is None and sample.values.shape[1] < VALUES_EACH * levels
    if levels > MOST_LEVELS or few or not float(folded.total()):
        return None
    while sample.edges is None and bins > 4 * levels and bins * VALUES_EACH > sample.values.shape[1]:
        bins //= 2
    end = torch.minimum(2.0 * quantile(folded.magnitude, folded.mass, 0.999), folded.limit).double()
    counts = kl_histogram(folded, end, bins)
    beyond = (folded.total() - counts.sum(1)).clamp(min=0.0)
    kept = torch.logspace(float(np.log10(levels)), float(np.log10(bins)), points).round().long().unique().unsqueeze(0)
    divergence = Divergence(counts, beyond, levels).at(kept)[0]
    thresholds = (kept[0] + 0.5) * end / bins
    found = []
    for threshold, value in zip(thresholds, divergence.tolist(), strict=True):
        low, high = folded.bounds(threshold.reshape(1))
        bound = high if float(normal.maximum) > 0 else low
        if np.isfinite(value):
            found.append((float(bound * factor), max(value, 0.0)))
    found.sort()
    return Curve([digits(x) for x, _ in found], [digits(y) for _, y in found]) if found else None


def _used(row: Tensor) -> list[float]:
    values = torch.unique(row)
    return [digits(value) for value in values.tolist()] if len(values) <= MAX_LEVELS else []


def _on_cpu(sample: Sample) -> Sample:
    mass, edges = (None if value is None else value.cpu() for value in (sample.mass, sample.edges))
    return Sample(sample.values.cpu(), mass, sample.minimum.cpu(), sample.maximum.cpu(), edges)
