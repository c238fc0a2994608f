"""The figures of a report as `matplotlib` figures, for PNG and SVG files, loggers and papers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lq_plugin import plots
from lq_plugin.model.cost import Cost, CostRow
from lq_plugin.model.fidelity import FidelityRow
from lq_plugin.plots.style import BLUE, FILL, INK, MUTED, PALETTE, STYLE, VERMILION, new_figure, short, styled
from lq_plugin.report.data import Boxes, LayerReport, ReportData, StudyReport, TensorView

FORMATS = ("png", "svg")


def write_pictures(report: ReportData, folder: str | Path, formats: Sequence[str] = FORMATS, max_layers: int = 8) -> list[Path]:
    """Write every figure of a report, those of layers for the largest `max_layers`.

    Returns:
        The files, `<folder>/<figure>.<format>`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in pictures(report, max_layers):
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        for kind in formats:
            path = folder / f"{safe}.{kind}"
            with rc_context(STYLE):
                # Without a date and the version, equal pictures are equal bytes.
                figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
            written.append(path)
    return written


def pictures(report: ReportData, max_layers: int = 8) -> Iterator[tuple[str, Figure]]:
    """Names and figures of a report."""
    if report.model is not None and report.model.layers:
        layers = report.model.layers
        yield "bits", plots.bits_per_layer(_cost(report))
        rows = [FidelityRow(x.name, slot, spec, x.sqnr_db.get(slot), x.clipped.get(slot)) for x in layers for slot, spec in x.specs.items()]
        if any(row.sqnr_db is not None and np.isfinite(row.sqnr_db) for row in rows):
            yield "sqnr", plots.sqnr_per_layer(rows)
        largest = sorted((x for x in layers if x.boxes), key=lambda x: -x.elements)[:max_layers]
        for layer in (x for x in layers if x in largest):
            yield f"layer_{layer.name}", layer_sheet(layer)
    if report.study is not None and report.study.trials:
        study = report.study
        yield "pareto", _pareto(study)
        yield "hypervolume", hypervolume(study)
        yield "parallel", parallel(study)
        if study.best:
            yield "best_bits", best_bits(study)
        if study.importance:
            yield "importance", importance(study)


def _cost(report: ReportData) -> Cost:
    """The priced rows that the report was made of; what is outside of layers follows from the total."""
    assert report.model is not None
    rows = []
    for x in report.model.layers:
        storage = 0 if x.effective_bits is None else round(x.effective_bits * x.elements)
        rows.append(CostRow(x.name, x.kind, x.elements, x.weight_bits, storage, x.input_bits, x.macs, x.bytes, x.float_bytes, x.tied_to))
    return Cost(tuple(rows), int(report.model.totals.get("bytes") or 0) - sum(row.bytes for row in rows))


@styled
def layer_sheet(layer: LayerReport) -> Figure:
    """Channels, histogram, criteria and roundings of one layer on one sheet."""
    views = layer.views
    figure = Figure(figsize=(11.0, 3.4 * (1 + len(views))), layout="constrained")
    grid = figure.add_gridspec(1 + len(views), 2)
    if layer.boxes is not None:
        _boxes(figure.add_subplot(grid[0, :]), layer.boxes)
    for row, view in enumerate(views, 1):
        _histogram(figure.add_subplot(grid[row, 0]), view)
        if view.mse is not None:
            _curves(figure.add_subplot(grid[row, 1]), view)
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
        axes.plot([], [], color=color, linestyle="--" if current else "-", label=mark.label + (" ★" if mark.wins else ""))
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


def _pareto(study: StudyReport) -> Figure:
    named = {t.origin: (t.cost, t.metric) for t in study.trials if t.origin != "sampled"}
    points = [(t.cost, t.metric) for t in study.trials]
    return plots.pareto(points, named, study.float_metric, study.metric, study.maximize, study.cost.replace("_", " "), study.name)


@styled
def hypervolume(study: StudyReport) -> Figure:
    """Dominated share of the box between worst and best values, after each trial."""
    figure, axes = new_figure(8.0, 3.2)
    axes.step(np.arange(1, len(study.hypervolume) + 1), study.hypervolume, where="post", color=BLUE)
    axes.set_ylim(0, None)
    axes.grid(True)
    axes.set_xlabel("trials")
    axes.set_title("Hypervolume over trials")
    return figure


@styled
def parallel(study: StudyReport) -> Figure:
    """One line a trial across metric, cost and the most important parameters."""
    columns: dict[str, list[Any]] = {study.metric: [t.metric for t in study.trials], study.cost: [t.cost for t in study.trials]}
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
    axes.add_collection(LineCollection(segments, colors=colormaps["viridis"](np.linspace(0, 1, len(order))), linewidths=widths, alpha=0.8))
    axes.set_xlim(-0.2, len(lines) - 0.8)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_yticks([])
    axes.set_title("Parallel coordinates, coloured by " + study.metric)
    return figure


@styled
def best_bits(study: StudyReport) -> Figure:
    """Bits of the weights of the best plans; white is float."""
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
    """Share of the metric's variation by parameter."""
    shown = list(study.importance.items())[:20][::-1]
    figure, axes = new_figure(7.0, 0.9 + 0.24 * len(shown))
    axes.barh([short(name, 34) for name, _ in shown], [value for _, value in shown], color=BLUE)
    axes.set_title(f"What mattered for {study.metric} (PED-ANOVA)")
    return figure
