"""The effect of quantization on one weight: channels, error by place, and learned roundings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lq_plugin.errors import SpecError
from lq_plugin.functional.adaround import neighbours
from lq_plugin.functional.error import sqnr_db
from lq_plugin.functional.grouping import blocks
from lq_plugin.intent.spec import PerChannel, PerTensor, QuantSpec
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.measure.fidelity import FidelityRow, weight_bounds
from lq_plugin.ptq.reconstruction.learn import UnitResult
from lq_plugin.quantizers import make_weight_quantizer
from lq_plugin.report.data import Boxes, ErrorMap, Rounding, digits

#: Columns of a box plot; channels beyond it share one.
MAX_COLUMNS = 64
#: Rows and columns of an error map.
MAX_CELLS = 24
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_FRACTIONS = 10


def in_force(layer: QuantizedLayer) -> Any:
    """Returns the weight quantizer of the current stage, once it has its range; else None."""
    current = None if layer.weight_quantizer is None else layer.weight_quantizer.current
    return None if current is None or current.lacks_range else current


def original(layer: QuantizedLayer, before: Tensor | None = None) -> Tensor:
    """Returns the weight to measure against, `[C_out, ...]` float32 on the CPU.

    Args:
        layer: whose weight it is.
        before: the weight before a reconstruction moved it; None: the present one.
    """
    return type(layer).canonical(layer, layer.weight if before is None else before).detach().float().cpu()


def quantized(layer: QuantizedLayer) -> Tensor:
    """Returns the weight on its levels, shaped like `original`; the quantizer has its range."""
    with torch.no_grad():
        y: Tensor = in_force(layer).quantize_values(type(layer).canonical(layer, layer.weight).detach()).float().cpu()
        return y


def against_originals(
    rows: Iterable[FidelityRow], layers: Mapping[str, nn.Module], before: Mapping[str, Tensor]
) -> list[FidelityRow]:
    """Returns rows in which learned roundings are measured against the weights before: those present lose nothing.

    Args:
        rows: of a model.
        layers: that they are of, by name.
        before: weights before a reconstruction moved them, by layer name.
    """
    ratios = {
        name: float(sqnr_db(original(layer, was), quantized(layer)))
        for name, was in before.items()
        if isinstance(layer := layers.get(name), QuantizedLayer) and in_force(layer) is not None
    }
    return [
        replace(row, sqnr_db=ratios[row.layer]) if row.slot == "weight" and row.layer in ratios else row for row in rows
    ]


def boxes(layer: QuantizedLayer, before: Tensor | None = None) -> Boxes:
    """Returns the quantiles of each output channel, with the range that the levels cover."""
    weight = original(layer, before)
    rows = weight.flatten(1) if weight.ndim > 1 else weight.unsqueeze(1)
    # torch.quantile takes 16 million numbers at most.
    quantiles = np.quantile(rows.numpy(), QUANTILES, axis=1)
    parts = np.array_split(np.arange(len(rows)), min(len(rows), MAX_COLUMNS))
    lowest, *middle, highest = quantiles
    joined = [
        _joined(lowest, parts, np.min),
        *(_joined(values, parts, np.mean) for values in middle),
        _joined(highest, parts, np.max),
    ]
    bounds = weight_bounds(layer)
    low, high = [], []
    if bounds is not None:
        low, high = _joined(bounds[0].cpu().numpy(), parts, np.min), _joined(bounds[1].cpu().numpy(), parts, np.max)
    step, ratios = _granularities(layer, weight, learned=before is not None)
    return Boxes(len(rows), joined, low, high, step, ratios)


def _joined(values: np.ndarray, parts: list[np.ndarray], how: Any) -> list[float]:
    return [digits(how(values[part]), 3) for part in parts]


def _granularities(layer: QuantizedLayer, weight: Tensor, learned: bool) -> tuple[float | None, dict[str, float]]:
    """Returns the step of one scale for all, and the SQNR of the same levels with other granularities.

    All are rounded to nearest. Learned roundings lose more of the weight to lose less of the output, so every other
    granularity would look better next to them.
    """
    quantizer = in_force(layer)
    if quantizer is None or not quantizer.spec.is_uniform or quantizer.spec.learned:
        return None, {}
    spec: QuantSpec = quantizer.spec
    ratios: dict[str, float] = {} if learned else {str(spec.granularity): digits(sqnr_db(weight, quantized(layer)))}
    step = None
    for granularity in dict.fromkeys((spec.granularity, PerTensor(), PerChannel())):
        if str(granularity) in ratios:
            continue
        try:
            other = make_weight_quantizer(spec.replace(granularity=granularity), "weight", tuple(weight.shape))
        except SpecError:  # a combination that the spec forbids is none to compare with
            continue
        with torch.no_grad():
            other.calibrate(weight)
            ratios[str(granularity)] = digits(sqnr_db(weight, other.eval().quantize_values(weight)))
            if granularity == PerTensor() != spec.granularity:
                scale, _ = other.qparams(blocks(weight, granularity))
                step = digits(scale.max())
    return step, ratios


def error_map(layer: QuantizedLayer, before: Tensor | None = None) -> ErrorMap | None:
    """Returns the error by place in the weight; None without a range."""
    if in_force(layer) is None:
        return None
    weight = original(layer, before)
    error = quantized(layer) - weight
    rows, columns = weight.shape[0], weight.shape[1] if weight.ndim > 1 else 1
    squares, power = (value.reshape(rows, columns, -1).double().square().sum(2).numpy() for value in (error, weight))
    # One measure for all cells: a cell's own mean square would make empty channels look worst.
    per_cell = power.sum() / max(weight.numel(), 1) * (weight.numel() / max(rows * columns, 1))
    down, across = (np.array_split(np.arange(size), min(size, MAX_CELLS)) for size in (rows, columns))
    cells: list[list[float | None]] = []
    for r in down:
        means = [
            float(value) / max(per_cell, 1e-300)
            for value in np.add.reduceat(squares[r].mean(0), [c[0] for c in across])
        ]
        means = [mean / len(c) for mean, c in zip(means, across, strict=True)]
        cells.append([digits(10 * np.log10(mean), 3) if mean > 0 else None for mean in means])
    return ErrorMap(rows, columns, cells)


def rounding(
    layer: QuantizedLayer, before: Tensor | None, unit: str = "", result: UnitResult | None = None
) -> Rounding | None:
    """Returns how often a learned rounding differs from rounding to nearest.

    Args:
        layer: reconstructed; its weights lie on their levels.
        before: the weight as it was before, shaped like the layer's; None: only the errors are told.
        unit, result: what the layer was reconstructed in, and how that went.
    """
    told: dict[str, Any] = {}
    if result is not None:
        told = {"unit": unit, "before": digits(result.before), "after": digits(result.after), "kept": result.kept}
    quantizer = in_force(layer)
    if before is None or quantizer is None or not quantizer.spec.is_uniform:
        return Rounding(0, 0, 0, **told) if told else None
    granularity = quantizer.spec.granularity
    now, was = (
        blocks(type(layer).canonical(layer, value.detach().to(layer.weight.device)).float(), granularity)
        for value in (layer.weight, before)
    )
    scale, zero_point = quantizer.qparams(now)
    low, high, fraction = neighbours(was, scale, zero_point, quantizer.spec.grid)
    nearest = torch.where(fraction >= 0.5, high, low)
    level = (now / scale).round()
    free = (high > low) & (was != 0)
    up, down = int(((level > nearest) & free).sum()), int(((level < nearest) & free).sum())
    tenth = (fraction * _FRACTIONS).long().clamp(max=_FRACTIONS - 1)
    shares: list[float | None] = []
    for index in range(_FRACTIONS):
        members = free & (tenth == index)
        count = int(members.sum())
        shares.append(digits(((level >= high) & members).sum() / count, 3) if count else None)
    return Rounding(int(free.sum()) - up - down, up, down, shares, **told)
