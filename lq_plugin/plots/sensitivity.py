"""The map of each tensor's sensitivity to each of its choices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lq_plugin.model.measure.cost import FLOAT_BITS
from lq_plugin.plots.style import FAINT, INK, new_figure, styled
from lq_plugin.utilities.brief import short, two_digits

_DECADES = 6
#: Up to so many rows have their numbers written into them.
_WRITTEN = 60


@styled
def sensitivity_map(
    values: Mapping[str, Mapping[int, float]], measure: str = "kl", title: str = "Sensitivity to quantization"
) -> Figure:
    """Returns a map with a row for each tensor and a column for each bit-width, darker for more harm.

    The scale of colours is logarithmic and spans at most six decades: what is less has the lightest colour. A bit-width
    that a tensor does not have is grey.

    Args:
        values: harm by tensor and bit-width, not below 0; rows are drawn in this order.
        measure: what was measured, written next to the colours.
        title: of the picture.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    names, widths = list(values), sorted({bits for row in values.values() for bits in row})
    if not widths:
        raise ValueError("no sensitivity to draw")
    table = np.array([[values[name].get(bits, np.nan) for bits in widths] for name in names])
    known = np.array([value for row in values.values() for value in row.values()])
    if not np.isfinite(known).all() or known.min() < 0:
        raise ValueError("sensitivities must be finite and not below 0")
    high = float(known.max()) or 1.0
    low = max(float(known[known > 0].min(initial=high / 10)), high * 10.0**-_DECADES)
    norm = LogNorm(low, high)
    figure, axes = new_figure(min(4.4 + 0.55 * len(widths), 16.0), min(1.3 + 0.26 * len(names), 40.0))
    axes.set_facecolor(FAINT)
    shown = axes.imshow(
        np.where(np.isnan(table), np.nan, np.maximum(table, low)), norm=norm, cmap="YlOrRd", aspect="auto"
    )
    if len(names) <= _WRITTEN:
        for row, name in enumerate(names):
            for column, bits in enumerate(widths):
                if (value := values[name].get(bits)) is not None:
                    color = "white" if norm(max(value, low)) > 0.62 else INK
                    axes.text(column, row, two_digits(value), ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(
        range(len(names)), [short(name, 44) for name in names], fontsize=8.5 if len(names) <= _WRITTEN else 6.5
    )
    axes.set_xticks(range(len(widths)), ["float" if bits == FLOAT_BITS else str(bits) for bits in widths])
    axes.set_xlabel("bit-width")
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.03, extend="min" if (known < low).any() else "neither")
    bar.set_label(f"{measure}, more is worse")
    return figure
