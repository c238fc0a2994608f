"""Numbers by layer: bits, and signal to quantization noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lq_plugin.model.measure.cost import FLOAT_BITS, Cost
from lq_plugin.model.measure.fidelity import FidelityRow
from lq_plugin.plots.style import BLUE, FAINT, GREEN, INK, MUTED, VERMILION, new_figure, styled
from lq_plugin.utilities.brief import short

#: x in parts of the axes, y in data.
_NEXT_TO: Any = ("axes fraction", "data")
_SLOTS = {"weight": (BLUE, "o"), "input": (VERMILION, "D"), "output": (GREEN, "s")}


@styled
def bits_per_layer(priced: Cost, title: str = "Bits per layer") -> Figure:
    """Returns bars of each weight's bits, with a lighter end for scales and zero points, and marks for input bits.

    Args:
        priced: of `lq_plugin.model.measure.cost`.

    Raises:
        ValueError: a cost without rows.
    """
    rows = list(priced)
    figure, axes = _layer_axes([row.name for row in rows])
    y = range(len(rows))
    colors = [BLUE if row.quantized else FAINT for row in rows]
    plain = [min(row.weight_bits, FLOAT_BITS) for row in rows]
    effective = [row.effective_bits or row.weight_bits for row in rows]
    extra = [max(e - p, 0.0) for e, p in zip(effective, plain, strict=True)]
    axes.barh(y, plain, height=0.68, color=colors, zorder=2)
    axes.barh(y, extra, left=plain, height=0.68, color="#A6CBE5", zorder=2)
    axes.plot([row.input_bits for row in rows], y, linestyle="", marker="D", markersize=5, color=VERMILION, zorder=4)
    # 32-bit layers would flatten all the others on a linear axis.
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 3, 4, 6, 8, 16, 32]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.minorticks_off()
    axes.set_xlim(0.8, 40)
    for i, (row, bits) in enumerate(zip(rows, effective, strict=True)):
        text = "tied" if row.tied_to and not row.storage_bits else "float" if not row.quantized else f"{bits:.2f}"
        axes.annotate(text, (1.06, i), xycoords=_NEXT_TO, ha="right", va="center", fontsize=8.5)
    axes.annotate("effective", (1.06, -0.75), xycoords=_NEXT_TO, ha="right", va="bottom", fontsize=8, color=MUTED)
    axes.set_xlabel("bits an element (log₂)")
    axes.set_title(
        f"{title}: {priced.effective_bits:.2f} effective a parameter, {_size(priced.bytes)} (float "
        f"{_size(priced.float_bytes)})"
    )
    handles = [
        _swatch(axes, BLUE, "weight"),
        _swatch(axes, "#A6CBE5", "scales and zero points"),
        axes.plot([], [], linestyle="", marker="D", markersize=5, color=VERMILION, label="input")[0],
    ]
    if not all(row.quantized for row in rows):
        handles.insert(2, _swatch(axes, FAINT, "float weight"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@styled
def sqnr_per_layer(rows: Iterable[FidelityRow], title: str = "Signal to quantization noise per layer") -> Figure:
    """Returns the SQNR of each quantized tensor as dots, and next to them clipped shares above one in a thousand.

    Args:
        rows: of `lq_plugin.model.measure.fidelity.layer_fidelity`; those without a number are left out.

    Raises:
        ValueError: when no row has a number.
    """
    known = [row for row in rows if row.sqnr_db is not None and isfinite(row.sqnr_db)]
    names = list(dict.fromkeys(row.layer for row in known))
    figure, axes = _layer_axes(names)
    place = {name: i for i, name in enumerate(names)}
    slots = [slot for slot in _SLOTS if any(row.slot == slot for row in known)]
    for name in names:
        values = [row.sqnr_db or 0.0 for row in known if row.layer == name]
        axes.plot([min(values), max(values)], [place[name]] * 2, color=FAINT, linewidth=2.0, zorder=1)
    for slot in slots:
        color, marker = _SLOTS[slot]
        chosen = [row for row in known if row.slot == slot]
        x = [row.sqnr_db or 0.0 for row in chosen]
        axes.plot(
            x,
            [place[row.layer] for row in chosen],
            linestyle="",
            marker=marker,
            markersize=6,
            color=color,
            label=slot,
            zorder=3,
        )
    for name in names:
        clipped = [
            (row.slot, row.clipping_share or 0.0)
            for row in known
            if row.layer == name and (row.clipping_share or 0.0) > 1e-3
        ]
        if clipped:
            text = "clipped " + ", ".join(f"{slot} {share:.1%}" for slot, share in clipped)
            axes.annotate(text, (1.01, place[name]), xycoords=_NEXT_TO, va="center", fontsize=7.5, color=MUTED)
    axes.grid(axis="x")
    axes.margins(x=0.06)
    axes.set_xlabel("SQNR (dB), more is better")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=len(slots))
    return figure


def _layer_axes(names: Sequence[str]) -> tuple[Figure, Axes]:
    """Returns axes with a row for each name, the first at the top; with many rows the figure grows, letters shrink."""
    if not names:
        raise ValueError("no layer to draw")
    each = 0.26 if len(names) <= 60 else 0.16
    figure, axes = new_figure(8.0, min(1.7 + each * len(names), 40.0))
    axes.set_yticks(range(len(names)), _telling(names), fontsize=8.5 if len(names) <= 60 else 6.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _telling(names: Sequence[str]) -> list[str]:
    """Returns names as short as they stay different: without shared outer modules, long ones without their middle."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    bare = [".".join(part[shared:]) for part in parts]
    cut = [short(name, 44) for name in bare]
    return cut if len(set(cut)) == len(set(bare)) else bare


def _swatch(axes: Axes, color: str, label: str) -> Any:
    return axes.fill_between([], [], color=color, label=label, linewidth=0)


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
