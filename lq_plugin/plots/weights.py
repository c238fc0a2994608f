"""Per-channel box plots of a weight, with the range its levels cover."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lq_plugin.plots.style import BLUE, FAINT, INK, MUTED, VERMILION, new_figure, styled
from lq_plugin.utilities.brief import short

#: More channels than this are drawn as bands instead of single boxes.
MAX_BOXES = 72
#: Columns of the band picture; channels beyond it share one.
MAX_COLUMNS = 512
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@styled
def weight_box_plot(
    weight: Tensor, minimum: Tensor | None = None, maximum: Tensor | None = None, name: str = "weight", spec: str = ""
) -> Figure:
    """Returns a box plot of each output channel, with the range that the levels cover.

    Boxes span the quartiles, whiskers the 5th to 95th percentile, dots are the extremes. With many
    channels the same numbers are drawn as bands along the channels.

    Args:
        weight: `[C_out, ...]`, any rank above 0.
        minimum, maximum: smallest and largest value that the levels represent, `[C_out]` or a scalar.
        name, spec: for the title.

    Raises:
        ValueError: an empty weight, or bounds of another size.
    """
    if weight.numel() == 0:
        raise ValueError(f"{name}: no values to draw, shape {list(weight.shape)}")
    rows = weight.detach().float().cpu().reshape(weight.shape[0], -1)
    channels = len(rows)
    quantiles = torch.quantile(rows, torch.tensor(_QUANTILES), dim=1).numpy()
    low, high = (_per_channel(bound, channels, name) for bound in (minimum, maximum))
    few = channels <= MAX_BOXES
    width = min(max(5.5, 2.5 + 0.16 * channels), 13.0) if few else 13.0
    figure, axes = new_figure(width, 4.0)
    if few:
        _draw_boxes(axes, quantiles, low, high)
    else:
        _draw_bands(axes, quantiles, low, high)
    axes.axhline(0.0, color=MUTED, linewidth=0.6, zorder=0.5)
    axes.grid(axis="y")
    axes.set_xlabel("output channel")
    axes.set_ylabel("weight")
    axes.set_title(short(name, 60) + (f"   {spec}" if spec else ""))
    handles = [
        Line2D([], [], color=INK, linewidth=1.6, label="median")
        if few
        else Line2D([], [], color=INK, linewidth=1.2, label="median"),
        Patch(facecolor=BLUE, alpha=0.55, label="quartiles"),
        Line2D([], [], color=BLUE, linewidth=1.2, label="5 % … 95 %")
        if few
        else Patch(facecolor=BLUE, alpha=0.25, label="5 % … 95 %"),
        Line2D([], [], color=MUTED, linestyle="", marker="o", markersize=2.5, label="extremes"),
    ]
    if low is not None or high is not None:
        handles.append(Line2D([], [], color=VERMILION, linewidth=1.6, label="quantization range"))
    # Outside the data, whatever its shape.
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _per_channel(bound: Tensor | None, channels: int, name: str) -> np.ndarray | None:
    if bound is None:
        return None
    values = bound.detach().float().cpu().reshape(-1)
    if values.numel() not in (1, channels):
        raise ValueError(
            f"{name}: bounds must be one number or one for each of {channels} channels, got {values.numel()}"
        )
    return values.expand(channels).numpy()


def _draw_boxes(axes: Axes, quantiles: np.ndarray, low: np.ndarray | None, high: np.ndarray | None) -> None:
    smallest, p5, q1, median, q3, p95, largest = quantiles
    x = np.arange(len(median))
    axes.vlines(x, p5, p95, color=BLUE, linewidth=1.2, zorder=2)
    axes.bar(x, q3 - q1, bottom=q1, width=0.62, facecolor="#7FB2D6", edgecolor=BLUE, linewidth=0.9, zorder=3)
    axes.hlines(median, x - 0.31, x + 0.31, color=INK, linewidth=1.6, zorder=4)
    axes.plot(np.r_[x, x], np.r_[smallest, largest], linestyle="", marker="o", markersize=2.5, color=MUTED, zorder=2)
    for bound in (low, high):
        if bound is not None:
            axes.hlines(bound, x - 0.45, x + 0.45, color=VERMILION, linewidth=1.6, zorder=5)
    axes.set_xlim(-0.8, len(x) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def _draw_bands(axes: Axes, quantiles: np.ndarray, low: np.ndarray | None, high: np.ndarray | None) -> None:
    channels = quantiles.shape[1]
    # Neighbours that share a column: the widest of their ranges, the mean of their middles.
    parts = np.array_split(np.arange(channels), min(channels, MAX_COLUMNS))
    edges = np.array([part[0] for part in parts] + [channels]) - 0.5

    def columns(values: np.ndarray, how: np.ufunc | None = None) -> np.ndarray:
        return np.array([values[part].mean() if how is None else how.reduce(values[part]) for part in parts])

    smallest, largest = columns(quantiles[0], np.minimum), columns(quantiles[-1], np.maximum)
    p5, q1, median, q3, p95 = (columns(quantiles[i]) for i in range(1, 6))
    axes.stairs(p95, edges, baseline=p5, fill=True, color=BLUE, alpha=0.25, linewidth=0, zorder=2)
    axes.stairs(q3, edges, baseline=q1, fill=True, color=BLUE, alpha=0.55, linewidth=0, zorder=3)
    axes.stairs(median, edges, baseline=None, color=INK, linewidth=0.9, zorder=4)
    middle = (edges[1:] + edges[:-1]) / 2
    axes.plot(
        np.r_[middle, middle], np.r_[smallest, largest], linestyle="", marker="o", markersize=1.4, color=MUTED, zorder=2
    )
    for bound, how in ((low, np.minimum), (high, np.maximum)):
        if bound is not None:
            axes.stairs(columns(bound, how), edges, baseline=None, color=VERMILION, linewidth=1.1, zorder=5)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_facecolor("white")
    axes.tick_params(axis="x", color=FAINT)
