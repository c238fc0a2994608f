"""The histogram of an activation, and where every range estimator would clip it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from lq_plugin.plots.style import FILL, INK, MARKERS, MUTED, PALETTE, new_figure, short, spread, styled
from lq_plugin.ranges import Histogram, Sample, compare_ranges
from lq_plugin.spec import QuantSpec

BINS = 120


@styled
def activation_histogram(
    data: Histogram | Sample,
    spec: QuantSpec | str,
    name: str = "activation",
    ranges: Iterable[str] | None = None,
    in_force: tuple[float, float] | None = None,
    row: int | None = None,
) -> Figure:
    """Elements by value, on a logarithmic axis, with the clipping thresholds of all estimators.

    The estimator with the smallest measured error is marked. Exact zeros have a level on every grid;
    where they are more than one in ten, they are counted in a note and not in a bar.

    Args:
        data: of one activation.
        spec: whose levels the thresholds are for.
        name: for the title.
        ranges: estimators to draw; those `compare_ranges` takes when None.
        in_force: the range the quantizer has now.
        row: which channel; the one that reaches furthest when None.

    Raises:
        CalibrationError: no data.
    """
    spec = QuantSpec.parse(spec)
    sample = data.sample() if isinstance(data, Histogram) else data
    reach = torch.maximum(sample.maximum.abs(), sample.minimum.abs())
    channel = int(reach.argmax()) if row is None else row
    one = sample.row(channel)
    table = compare_ranges(one, spec, ranges)
    entries = table.entries()
    figure, axes = new_figure(9.0, 5.2)
    zeros = _draw_histogram(axes, one)
    marks = [(entry.range, entry.minimum, entry.maximum, f"{entry.sqnr_db:.1f} dB", entry.wins) for entry in entries]
    if in_force is not None:
        marks.append(("in force", *in_force, "", False))
    _draw_thresholds(axes, marks, float(one.minimum))
    place = f", channel {channel} of {sample.rows}" if sample.rows > 1 else ""
    axes.set_xlabel(f"value   (best: {table.best}; shape: {table.distribution}{zeros})")
    axes.set_ylabel("elements a bin")
    figure.suptitle(f"{short(name, 52)}   {spec}{place}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _draw_histogram(axes: Axes, sample: Sample) -> str:
    """Bars of equal width; returns what the note says of zeros."""
    low, high = min(float(sample.minimum), 0.0), max(float(sample.maximum), 0.0)
    if low == high:
        low, high = -1.0, 1.0
    edges = np.linspace(low, high, BINS + 1)
    mass = sample.weights()[0].double().numpy()
    values = sample.values[0].double().numpy()
    bins = 0 if sample.edges is None else sample.edges.shape[1] - 1
    counts = np.zeros(BINS)
    if sample.edges is not None:
        # The mass of a bin is spread evenly over its width.
        known = sample.edges[0].double().numpy()
        below = np.concatenate([[0.0], np.cumsum(mass[:bins])])
        known, first = np.unique(known, return_index=True)
        last = np.append(first[1:] - 1, len(below) - 1)
        counts += np.diff(np.interp(edges, known, below[last]))
    points, weights = values[bins:], mass[bins:]
    at_zero = points == 0
    total, zeros = mass.sum(), weights[at_zero].sum()
    many = zeros > 0.1 * total
    keep = ~at_zero if many else np.ones_like(at_zero)
    counts += np.histogram(points[keep], edges, weights=weights[keep])[0]
    axes.set_yscale("log")
    shown = np.where(counts >= 0.5, counts, np.nan)
    axes.stairs(np.nan_to_num(shown, nan=0.0), edges, fill=True, facecolor=FILL, edgecolor="none", zorder=1)
    axes.set_ylim(0.5, max(np.nanmax(shown, initial=1.0) * 1.6, 2.0))
    margin = 0.02 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    return f"; {zeros / total:.0%} exact zeros left out" if many else ""


def _draw_thresholds(axes: Axes, marks: list[tuple[str, float, float, str, bool]], smallest: float) -> None:
    """A line for each bound; labels above the axes, spread so that they do not overlap, led to their lines."""
    left, right = axes.get_xlim()
    transform = blended_transform_factory(axes.transData, axes.transAxes)
    # A label stands upright: its width is one line of text, 0.2 of 9 inches.
    positions = spread([high for _, _, high, _, _ in marks], 0.026 * (right - left), left, right)
    for index, ((label, low, high, note, wins), x) in enumerate(zip(marks, positions, strict=True)):
        current = label == "in force"
        color = INK if current else PALETTE[index % (len(PALETTE) - 1)]
        style: Any = {"color": color, "linewidth": 2.0 if wins else 1.3, "linestyle": (0, (4, 2)) if current else "-", "zorder": 4 + wins}
        axes.axvline(high, **style)
        if low < 0 and smallest < 0:
            axes.axvline(low, **style)
        marker = MARKERS[index % len(MARKERS)]
        # The same marker on both bounds of one estimator, at a height of its own.
        height = 0.97 - 0.05 * index
        inside = [bound for bound in ((low, high) if low < 0 and smallest < 0 else (high,)) if left <= bound <= right]
        axes.plot(inside, [height] * len(inside), linestyle="", marker=marker, markersize=4.5, color=color, transform=transform, zorder=6)
        axes.plot([high, x], [1.0, 1.05], color=color, linewidth=0.9, transform=transform, clip_on=False)
        text = f"{label}  {high:.3g}" + (f"  {note}" if note else "")
        weight = "bold" if wins else "normal"
        axes.text(x, 1.06, text, rotation=90, ha="center", va="bottom", color=color, fontsize=8.5, fontweight=weight, transform=transform)
    axes.tick_params(axis="x", color=MUTED)
