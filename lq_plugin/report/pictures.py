"""The figures of a report as `matplotlib` figures, for PNG and SVG files, loggers and papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lq_plugin import plots
from lq_plugin.model.measure.cost import FLOAT_BITS, Cost, CostRow
from lq_plugin.model.measure.fidelity import FidelityRow
from lq_plugin.plots.style import BLUE, FILL, INK, MUTED, PALETTE, STYLE, VERMILION, new_figure, styled
from lq_plugin.report.data import (
    Boxes,
    ErrorMap,
    LayerReport,
    ModelReport,
    ReportData,
    Rounding,
    Series,
    StudyReport,
    TensorView,
)
from lq_plugin.report.registry import (
    register_layer_picture as register_layer_picture,
    register_picture as register_picture,
    registered_pictures,
)
from lq_plugin.utilities.brief import short
from lq_plugin.utilities.files import file_name, make_folder, replacing

FORMATS = ("png", "svg")
#: Beginnings of the names of the library's own curves: of the model, and of a layer, which 0.1 did not tell apart.
_OWN = ("quant/", "quant_layer/")
#: Quantities whose curves are drawn, losses first.
MAX_CURVES = 12


def write_pictures(
    report: ReportData, folder: str | Path, formats: Sequence[str] = FORMATS, max_layers: int = 8
) -> list[Path]:
    """Writes every figure of a report; figures of layers for the largest `max_layers`.

    Args:
        report: to draw.
        folder: is made where it does not exist.
        formats: `png`, `svg`, or another one that matplotlib writes.
        max_layers: figures of layers are drawn for that many, the largest ones.

    Returns:
        The files, `<folder>/<figure>.<format>`.
    """
    folder = make_folder(folder)
    written = []
    for name, figure in pictures(report, max_layers):
        for kind in formats:
            path = folder / f"{file_name(name)}.{kind}"
            with rc_context(STYLE), replacing(path) as stream:
                # Without a date and the version, equal pictures are equal bytes.
                figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
            # Places are found once: a search for them takes as long as drawing does.
            figure.set_layout_engine("none")
            written.append(path)
    return written


def pictures(report: ReportData, max_layers: int = 8) -> Iterator[tuple[str, Figure]]:
    """Yields the name and the figure of everything that a report has values for, see `lq_plugin.report.registry`.

    Args:
        report: to draw.
        max_layers: the figures of layers are drawn for that many, the largest ones.
    """
    return registered_pictures(report, max_layers)


@register_picture("bits")
def _bits(report: ReportData) -> Figure | None:
    return plots.bits_per_layer(_cost(report.model)) if report.model is not None and report.model.layers else None


@register_picture("sqnr")
def _sqnr(report: ReportData) -> Figure | None:
    layers = [] if report.model is None else report.model.layers
    rows = [
        FidelityRow(x.name, slot, spec, x.sqnr_db.get(slot), x.clipped.get(slot))
        for x in layers
        for slot, spec in x.specs.items()
    ]
    known = any(row.sqnr_db is not None and np.isfinite(row.sqnr_db) for row in rows)
    return plots.sqnr_per_layer(rows) if known else None


@register_picture("training")
def _training(report: ReportData) -> Figure | None:
    curves = {} if report.model is None else quantities(report.model)
    return training(report.model, curves) if report.model is not None and curves else None


def _of_study(draw: Callable[[StudyReport], Figure], wanted: str = "trials") -> Callable[[ReportData], Figure | None]:
    """Returns a function of a report that draws its study, where the study has values in the field `wanted`."""

    def of_report(report: ReportData) -> Figure | None:
        study = report.study
        return draw(study) if study is not None and study.trials and getattr(study, wanted) else None

    return of_report


def _cost(model: ModelReport) -> Cost:
    """Returns the priced rows that a report was made of; the cost outside of layers follows from the totals."""
    rows = []
    for x in model.layers:
        storage = 0 if x.effective_bits is None else round(x.effective_bits * x.elements)
        rows.append(
            CostRow(
                x.name,
                x.kind,
                x.elements,
                x.weight_bits,
                storage,
                x.input_bits,
                x.macs,
                x.bytes,
                x.float_bytes,
                x.tied_to,
            )
        )
    other_bytes = int(model.totals.get("bytes") or 0) - sum(row.bytes for row in rows)
    elements, bits = sum(row.owned for row in rows), sum(row.storage_bits for row in rows)
    # Parameters outside of the layers are float, so that many of them make up the mean.
    mean = model.totals.get("effective_bits")
    others = 0 if mean is None or mean >= FLOAT_BITS else max(0, round((elements * mean - bits) / (FLOAT_BITS - mean)))
    return Cost(tuple(rows), other_bytes, others, others * FLOAT_BITS)


@register_layer_picture("layer")
@styled
def layer_sheet(layer: LayerReport) -> Figure:
    """Returns a sheet with channels, histogram, criteria, roundings and error map of one layer."""
    views = layer.views
    told = layer.rounding if layer.rounding is not None and layer.rounding.up_share else None
    rows = 1 + len(views) + (layer.error is not None or told is not None)
    figure = Figure(figsize=(11.0, 3.4 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    if layer.boxes is not None:
        _boxes(figure.add_subplot(grid[0, :]), layer.boxes)
    for row, view in enumerate(views, 1):
        _histogram(figure.add_subplot(grid[row, 0]), view)
        if view.mse is not None:
            _curves(figure.add_subplot(grid[row, 1]), view)
    if told is not None:
        _rounding(figure.add_subplot(grid[rows - 1, 0]), told)
    if layer.error is not None:
        _error_map(figure, figure.add_subplot(grid[rows - 1, 1]), layer.error)
    specs = ", ".join(f"{slot} {spec}" for slot, spec in layer.specs.items()) or "float"
    figure.suptitle(f"{short(layer.name, 60)}   {specs}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _boxes(axes: Axes, boxes: Boxes) -> None:
    lowest, p5, q1, median, q3, p95, highest = (np.array(values) for values in boxes.quantiles)
    x = np.arange(len(median)) * boxes.channels / len(median)
    width = 0.62 * boxes.channels / len(median)
    axes.vlines(x, p5, p95, color=BLUE, linewidth=1.0)
    axes.bar(x, q3 - q1, bottom=q1, width=width, facecolor="#7FB2D6", edgecolor=BLUE, linewidth=0.7)
    axes.hlines(median, x - width / 2, x + width / 2, color=INK, linewidth=1.3)
    axes.plot(np.r_[x, x], np.r_[lowest, highest], linestyle="", marker="o", markersize=2, color=MUTED)
    for bound in (boxes.low, boxes.high):
        if bound:
            axes.hlines(bound, x - width * 0.7, x + width * 0.7, color=VERMILION, linewidth=1.5)
    told = ", ".join(f"{name.replace('_', ' ')} {value:.1f} dB" for name, value in boxes.sqnr_db.items())
    axes.set_title(f"weight by output channel{f'   ({told})' if told else ''}", fontweight="normal")


def _histogram(axes: Axes, view: TensorView) -> None:
    edges = np.linspace(view.low, view.high, len(view.counts) + 1)
    axes.set_ylim(0.5, max(*view.counts, 1.0) * 1.6)
    axes.set_yscale("log")
    axes.stairs(np.maximum(view.counts, 0.5), edges, baseline=0.5, fill=True, facecolor=FILL)
    for index, mark in enumerate(view.marks):
        current = mark.label == "in force"
        color: Any = INK if current else PALETTE[index % len(PALETTE)]
        for bound in {mark.high} | ({mark.low} if view.low < 0 else set()):
            axes.axvline(bound, color=color, linewidth=2.0 if mark.wins else 1.1, linestyle="--" if current else "-")
        axes.plot(
            [], [], color=color, linestyle="--" if current else "-", label=mark.label + (" ★" if mark.wins else "")
        )
    axes.set_title(f"{view.slot}: {view.spec}, {view.what}", fontweight="normal")
    if view.marks:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _curves(axes: Axes, view: TensorView) -> None:
    assert view.mse is not None
    axes.plot(view.mse.threshold, np.maximum(view.mse.error, 1e-30), color=BLUE)
    axes.set_yscale("log")
    axes.set_ylabel("mean squared error", color=BLUE)
    if view.kl is not None:
        other = axes.twinx()
        other.plot(view.kl.threshold, view.kl.error, color=VERMILION)
        other.set_ylabel("KL divergence", color=VERMILION)
    axes.set_title("criteria over the threshold", fontweight="normal")


def _rounding(axes: Axes, told: Rounding) -> None:
    tenths = np.arange(len(told.up_share)) / len(told.up_share)
    shares = np.array([np.nan if share is None else share for share in told.up_share], dtype=float)
    axes.bar(tenths + 0.05, shares, width=0.09, color=BLUE, alpha=0.7, label="learned")
    axes.plot([0, 0.5, 0.5, 1], [0, 0, 1, 1], color=INK, linewidth=1.3, label="nearest")
    axes.set_xlabel("place between the two levels")
    axes.set_ylabel("share rounded up")
    axes.set_title(f"learned rounding: {told.up} up, {told.down} down against nearest", fontweight="normal")
    axes.legend(fontsize=7)


def _error_map(figure: Figure, axes: Axes, error: ErrorMap) -> None:
    cells = np.array([[np.nan if cell is None else cell for cell in row] for row in error.cells], dtype=float)
    extent = (0, error.columns, error.rows, 0)
    image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
    figure.colorbar(image, label="dB")
    axes.set_xlabel("input channel")
    axes.set_ylabel("output channel")
    axes.set_title("error of the weight over its mean square", fontweight="normal")


def quantities(model: ModelReport) -> dict[str, list[Series]]:
    """Returns logged curves by quantity: losses, the run's own metrics, then what training moved in the layers."""
    groups: dict[str, list[Series]] = {}
    for series in model.training:
        groups.setdefault(series.name.rpartition("/")[2], []).append(series)

    def place(name: str) -> tuple[bool, bool, bool]:
        own = any(not series.name.startswith(_OWN) for series in groups[name])
        return name != "loss", not own, not name.endswith(("_flips", "_zeros", "_scale_max"))

    moved = [
        name
        for name, found in groups.items()
        if not place(name)[1] or any(len(set(series.values)) > 1 for series in found)
    ]
    return {name: groups[name] for name in sorted(moved, key=place)[:MAX_CURVES]}


@styled
def training(model: ModelReport, curves: dict[str, list[Series]]) -> Figure:
    """Returns a figure of the logged curves over optimizer steps, with the moments of the schedule."""
    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(11.0, 2.8 * rows), layout="constrained")
    for index, (name, found) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, 2, index + 1)
        shown = found[: len(PALETTE)]
        for color, series in zip(PALETTE, shown, strict=False):
            label = series.name.removeprefix("quant/").removeprefix("quant_layer/").rpartition("/")[0] or series.name
            axes.plot(series.steps, series.values, color=color, linewidth=1.2, label=short(label, 24))
        for change in model.schedule:
            step = (
                change.count
                if change.unit == "step"
                else change.count * model.epoch_steps
                if model.epoch_steps
                else None
            )
            if change.count and step is not None:
                axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=":")
        more = f" ({len(found) - len(shown)} more are not shown)" if len(found) > len(shown) else ""
        axes.set_title(name.replace("_", " ") + more, fontweight="normal")
        axes.set_xlabel("optimizer step")
        axes.grid(True)
        axes.legend(fontsize=7)
    return figure


def _pareto(study: StudyReport) -> Figure:
    points = [(t.cost, t.metric if t.mean is None else t.mean) for t in study.trials]
    named = list(zip(study.trials, points, strict=True))
    uniform = {t.origin: point for t, point in named if t.origin.startswith("uniform")}
    seeds = [point for t, point in named if t.origin not in ("sampled", "refined") and t.origin not in uniform]
    return plots.pareto(
        points,
        uniform,
        study.float_metric,
        study.metric,
        study.maximize,
        study.cost.replace("_", " "),
        f"{study.name}: {study.metric}",
        seeds,
        bounds=[t.metric if t.bound is None else t.bound for t in study.trials],
        intervals=[(t.cost, t.low, t.high) for t in study.trials if t.low is not None and t.high is not None],
    )


@styled
def hypervolume(study: StudyReport) -> Figure:
    """Returns a figure of the dominated share of the box between worst and best values, after each trial."""
    figure, axes = new_figure(8.0, 3.2)
    axes.step(np.arange(1, len(study.hypervolume) + 1), study.hypervolume, where="post", color=BLUE)
    axes.set_ylim(0, None)
    axes.grid(True)
    axes.set_xlabel("trials")
    axes.set_title("Hypervolume over trials")
    return figure


@styled
def parallel(study: StudyReport) -> Figure:
    """Returns a figure with a line for each trial across metric, cost and the most important parameters."""
    columns: dict[str, list[Any]] = {
        study.metric: [t.metric for t in study.trials],
        study.cost: [t.cost for t in study.trials],
    }
    columns |= study.parameters
    figure, axes = new_figure(min(2.0 + 1.3 * len(columns), 14.0), 4.2)
    scaled, labels = [], []
    for name, values in columns.items():
        known = [v for v in values if v is not None]
        if known and all(isinstance(v, (int, float)) for v in known):
            low, high = min(known), max(known)
            scaled.append([np.nan if v is None else (v - low) / ((high - low) or 1.0) for v in values])
            labels.append(f"{short(name, 18)}\n{low:.4g}…{high:.4g}")
        else:
            kinds = sorted(set(map(str, known)))
            scaled.append([np.nan if v is None else kinds.index(str(v)) / max(len(kinds) - 1, 1) for v in values])
            labels.append(f"{short(name, 18)}\n{len(kinds)} kinds")
    lines = np.array(scaled)
    order = np.argsort([t.metric if study.maximize else -t.metric for t in study.trials])
    segments = [np.column_stack([np.arange(len(lines)), lines[:, index]]) for index in order]
    widths = [1.4 if study.trials[index].front else 0.5 for index in order]
    # One artist: hundreds of lines would be laid out one by one.
    axes.add_collection(
        LineCollection(
            segments, colors=colormaps["viridis"](np.linspace(0, 1, len(order))), linewidths=widths, alpha=0.8
        )
    )
    axes.set_xlim(-0.2, len(lines) - 0.8)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_yticks([])
    axes.set_title("Parallel coordinates, coloured by " + study.metric)
    return figure


@styled
def best_bits(study: StudyReport) -> Figure:
    """Returns a figure of the weight bits of the best plans; white is float."""
    bits = np.array([[np.nan if v is None else v for v in plan.weight_bits] for plan in study.best], dtype=float)
    figure, axes = new_figure(min(3.0 + 0.14 * bits.shape[1], 16.0), min(1.8 + 0.16 * bits.shape[0], 9.0))
    image = axes.imshow(bits, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, label="bits")
    axes.set_yticks(range(len(study.best)), [f"#{plan.number}" for plan in study.best], fontsize=6)
    size = 6 if len(study.layers) <= 120 else 4
    axes.set_xticks(range(len(study.layers)), [short(name, 20) for name in study.layers], rotation=90, fontsize=size)
    axes.set_title("Bits of the weights, best plan first")
    return figure


@styled
def importance(study: StudyReport) -> Figure:
    """Returns a figure of each parameter's share of the metric's variation."""
    shown = list(study.importance.items())[:20][::-1]
    figure, axes = new_figure(7.0, 0.9 + 0.24 * len(shown))
    axes.barh([short(name, 34) for name, _ in shown], [value for _, value in shown], color=BLUE)
    axes.set_title(f"What mattered for {study.metric} (PED-ANOVA)")
    return figure


register_picture("pareto")(_of_study(_pareto))
register_picture("hypervolume")(_of_study(hypervolume))
register_picture("parallel")(_of_study(parallel))
register_picture("best_bits")(_of_study(best_bits, "best"))
register_picture("importance")(_of_study(importance, "importance"))
