"""The histogram of an activation, with the clipping bounds of every range estimator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from lq_plugin.intent.spec import QuantSpec
from lq_plugin.plots.style import FILL, INK, MARKERS, PALETTE, new_figure, spread, styled
from lq_plugin.ranges import Histogram, Sample, compare_ranges
from lq_plugin.utilities.brief import short

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
    """Returns a histogram on a logarithmic axis, with the clipping thresholds of all estimators.

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
    channel = int(sample.reach().argmax()) if row is None else row
    one = sample.row(channel)
    table = compare_ranges(one, spec, ranges)
    entries = table.entries()
    figure, axes = new_figure(9.8, 4.4)
    zeros = _draw_histogram(axes, one)
    marks = [
        _Mark(entry.range, entry.minimum, entry.maximum, f"{entry.sqnr_db:.1f} dB", entry.wins) for entry in entries
    ]
    if in_force is not None:
        marks.append(_Mark("in force", *in_force, "", False))
    handles = _draw_thresholds(axes, marks, float(one.minimum))
    notes = ["", f"best   {table.best}", f"shape  {table.distribution}", zeros]
    handles += [Line2D([], [], linestyle="", label=note) for note in notes]
    figure.legend(handles=handles, loc="outside right upper", prop={"family": "monospace", "size": 8})
    place = f", channel {channel} of {sample.rows}" if sample.rows > 1 else ""
    axes.set_xlabel("value")
    axes.set_ylabel("elements a bin")
    figure.suptitle(f"{short(name, 52)}   {spec}{place}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _draw_histogram(axes: Axes, sample: Sample) -> str:
    """Draws bars of equal width; returns the note about zeros."""
    edges, counts, zeros = sample.bars(BINS)
    low, high = edges[0], edges[-1]
    shown = np.where(counts >= 0.5, counts, 0.0)
    # The limits come first: a constant of zero leaves nothing to scale by.
    axes.set_ylim(0.5, max(shown.max() * 1.6, 2.0))
    axes.set_yscale("log")
    axes.stairs(shown, edges, baseline=0.5, fill=True, facecolor=FILL, edgecolor="none", zorder=1)
    margin = 0.02 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    return f"{zeros:.0%} exact zeros, not drawn" if zeros else ""


class _Mark(NamedTuple):
    label: str
    low: float
    high: float
    note: str
    wins: bool


def _draw_thresholds(axes: Axes, marks: list[_Mark], smallest: float) -> list[Line2D]:
    """Draws a line for each bound, with names above the axes that are spread so that they do not overlap.

    Returns the legend's entries, with the numbers.
    """
    left, right = axes.get_xlim()
    # A threshold a little beyond the data is shown, one far beyond would squeeze the data.
    right = max([right, *(1.02 * mark.high for mark in marks if mark.high <= 1.5 * right)])
    axes.set_xlim(left, right)
    transform = blended_transform_factory(axes.transData, axes.transAxes)
    # A name stands upright: it is one line of text wide, and the axes are about 40 lines.
    positions = spread([mark.high for mark in marks], 0.028 * (right - left), left, right)
    handles = [Line2D([], [], linestyle="", label=_columns("", "bounds", "SQNR"))]
    for index, (mark, x) in enumerate(zip(marks, positions, strict=True)):
        current = mark.label == "in force"
        color = INK if current else PALETTE[index % (len(PALETTE) - 1)]
        style: Any = {
            "color": color,
            "linewidth": 2.0 if mark.wins else 1.3,
            "linestyle": (0, (4, 2)) if current else "-",
        }
        bounds = [mark.high] + [mark.low] * (mark.low < 0 and smallest < 0)
        for bound in bounds:
            axes.axvline(bound, zorder=4 + mark.wins, **style)
        # The same marker on both bounds of one estimator, at a height of its own.
        marker: Any = {
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
        }
        inside = [bound for bound in bounds if left <= bound <= right]
        heights = [0.96 - 0.06 * index] * len(inside)
        axes.plot(inside, heights, linestyle="", color=color, transform=transform, zorder=6, **marker)
        # A range in force may reach far beyond the data: its name points there.
        foot, name = (mark.high, mark.label) if mark.high <= right else (right, f"{mark.label} →")
        axes.plot([foot, x], [1.0, 1.05], color=color, linewidth=0.9, transform=transform, clip_on=False)
        weight = "bold" if mark.wins else "normal"
        axes.text(
            x, 1.06, name, rotation=90, ha="center", va="bottom", color=color, fontweight=weight, transform=transform
        )
        reach = f"{mark.low:.3g}…{mark.high:.3g}"
        handles.append(Line2D([], [], label=_columns(mark.label, reach, mark.note), **style, **marker))
    return handles


def _columns(name: str, reach: str, note: str) -> str:
    return f"{name:<10} {reach:>13} {note:>8}"
