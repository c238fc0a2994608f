"""The plans of a search by quality and size, with those that no other is better than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lq_plugin.plots.style import BLUE, INK, MARKERS, MUTED, PALETTE, SKY, new_figure, spread, styled
from lq_plugin.utilities.front import Point, pareto_front


@styled
def pareto(
    points: Sequence[Point],
    references: Mapping[str, Point] | None = None,
    float_metric: float | None = None,
    metric: str = "accuracy",
    maximize: bool = True,
    size: str = "effective bits a parameter",
    title: str = "Search: quality over size",
    seeds: Sequence[Point] = (),
    bounds: Sequence[float] | None = None,
    intervals: Sequence[tuple[float, float, float]] = (),
) -> Figure:
    """Returns a figure of all plans of a search, with the front and named plans.

    The vertical axis shows the better part: from the best on, three times as far as half of the trials reach. The
    others are counted, and references among them named, in a note.

    Args:
        points: `(size, metric)` of each trial.
        references: named plans, such as uniform ones.
        float_metric: of the model before quantization.
        metric: its name.
        maximize: whether more is better.
        seeds: those of the points that were made from sensitivities, before anything was searched.
        bounds: by which the front is chosen, one a point; None: by the metrics.
        intervals: `(size, low, high)` of metrics that are known so well.

    Raises:
        ValueError: when there are no points or one is not finite.
    """
    named = dict(references or {})
    if not points:
        raise ValueError("no points to draw")
    if not np.isfinite([*points, *named.values()]).all():
        raise ValueError("points must be finite: leave failed trials out")
    sure = points if bounds is None else [(point[0], bound) for point, bound in zip(points, bounds, strict=True)]
    front = [points[i] for i in pareto_front(sure, maximize)]
    figure, axes = new_figure(8.0, 5.0)
    xs = [p[0] for p in (*points, *named.values())]
    margin = 0.06 * (max(xs) - min(xs) or 1.0)
    axes.set_xlim(min(xs) - margin, max(xs) + 2.5 * margin)
    hidden = _limit_y(axes, [p[1] for p in points], [p[1] for p in named.values()], float_metric, maximize)
    low, high = axes.get_ylim()
    absent = [name for name, (_, quality) in named.items() if not low <= quality <= high]
    axes.grid(True)
    all_x, all_y = zip(*points, strict=True)
    axes.scatter(
        all_x, all_y, 20, SKY, edgecolors="white", linewidths=0.4, alpha=0.75, zorder=2, label=f"{len(points)} trials"
    )
    for at_size, worst, best in intervals:
        axes.vlines(at_size, worst, best, color=BLUE, linewidth=1.2, alpha=0.8, zorder=3)
    # It may be empty.
    front_x, front_y = [x for x, _ in front], [y for _, y in front]
    axes.step(front_x, front_y, where="post", color=BLUE, linewidth=1.4, alpha=0.7, zorder=3)
    axes.scatter(
        front_x, front_y, 46, BLUE, edgecolors="white", linewidths=0.8, zorder=4, label=f"Pareto front ({len(front)})"
    )
    if float_metric is not None:
        axes.axhline(float_metric, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
        at: Any = ("axes fraction", "data")
        axes.annotate(
            f"float {float_metric:.4g}", (0.004, float_metric), (0, 4), at, textcoords="offset points", fontsize=8.5
        )
    if seeds:
        label = f"from sensitivity ({len(seeds)})"
        seed_x, seed_y = zip(*seeds, strict=True)
        axes.scatter(seed_x, seed_y, 58, "none", marker="D", edgecolors=INK, linewidths=1.1, zorder=5, label=label)
    _draw_references(axes, {name: point for name, point in named.items() if name not in absent})
    if hidden or absent:
        beyond = [f"{hidden} trials"] * bool(hidden) + absent
        text = f"{', '.join(beyond)} {'below' if maximize else 'above'} the picture"
        y = 0.012 if maximize else 0.965
        axes.annotate(text, (0.995, y), xycoords="axes fraction", ha="right", fontsize=8, color=MUTED)
    axes.set_xlabel(size)
    axes.set_ylabel(metric)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _limit_y(
    axes: Axes, quality: Sequence[float], named: Sequence[float], float_metric: float | None, maximize: bool
) -> int:
    """Sets the limits; returns how many trials are outside."""
    sign = 1.0 if maximize else -1.0
    good = sign * np.array([*quality, *named])
    best, middle = float(good.max()), float(np.median(sign * np.array(quality)))
    # The front's own tail may fall to guessing, and would squeeze what matters into a line.
    least = best - max(3.0 * (best - middle), 0.02 * abs(best))
    must = [sign * float(q) for q in good if q >= least] + ([] if float_metric is None else [float_metric])
    low, high = min(must), max(must)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    # Twice above: the labels of the best plans are there.
    low, high = low - pad, high + 2 * pad
    axes.set_ylim(low, high)
    return sum(not low <= q <= high for q in quality)


def _draw_references(axes: Axes, named: Mapping[str, Point]) -> None:
    """Draws named points, with labels to their upper left (a good front has no trials there), spread to not overlap."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    gap = 0.048 * (high - low)
    aside, letter = 0.02 * (right - left), 0.0115 * (right - left)
    # A label that would leave the axes on the left goes to the other side.
    width = {name: aside + letter * len(name) for name in named}
    on_left = {name: x - width[name] > left for name, (x, _) in named.items()}
    order = list(named)
    extents = {name: (x - width[name], x) if on_left[name] else (x, x + width[name]) for name, (x, _) in named.items()}
    for names in _side_by_side(extents):
        heights = spread([named[name][1] + gap for name in names], gap, low + gap / 2, high - gap / 2)
        for name, height in zip(names, heights, strict=True):
            index = order.index(name)
            x, y = named[name]
            color, marker = PALETTE[1:][index % (len(PALETTE) - 1)], MARKERS[index % len(MARKERS)]
            axes.scatter([x], [y], s=60, color=color, marker=marker, edgecolors="white", linewidths=0.8, zorder=5)
            axes.annotate(
                name,
                (x, y),
                (x - aside if on_left[name] else x + aside, height),
                ha="right" if on_left[name] else "left",
                va="center",
                fontsize=8.5,
                color=color,
                fontweight="bold",
                zorder=6,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
            )


def _side_by_side(extents: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Returns names in groups whose horizontal extents `(left, right)` do not overlap.

    >>> _side_by_side({"a": (0, 2), "b": (5, 6), "c": (1, 3)})
    [['a', 'c'], ['b']]
    """
    groups: list[list[str]] = []
    reach = -np.inf
    for name in sorted(extents, key=lambda n: extents[n][0]):
        if extents[name][0] >= reach:
            groups.append([])
        groups[-1].append(name)
        reach = max(reach, extents[name][1])
    return groups
