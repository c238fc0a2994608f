"""One style for all pictures, which are drawn on a `Figure` of their own and never by pyplot.

No backend is chosen, no global state is kept, and a figure is gone when nobody holds it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lq_plugin.utilities.files import make_folder, write_file

#: Okabe and Ito's colours, told apart by colour-blind readers (jfly.uni-koeln.de/color).
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, MUTED, FAINT, FILL = "#222222", "#6B7280", "#D9DCE1", "#C9D7E3"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#7A5C3E", INK)
MARKERS = ("D", "s", "^", "v", "P", "X", "o", "*")
DPI = 144

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    # A $ in a name is a $.
    "text.parse_math": False,
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator for functions that draw in `STYLE`; matplotlib's own settings are unchanged."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns an empty figure, sized in inches, and its axes; its parts make room for each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def to_png(figure: Figure) -> bytes:
    """Returns the picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    # Without the version of matplotlib in it, equal pictures are equal bytes.
    with rc_context(STYLE):
        figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the picture as a PNG file; folders are made."""
    path = Path(path)
    make_folder(path.parent)
    write_file(path, to_png(figure))
    return path


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns the positions nearest to the wanted ones that are `gap` apart and within `[low, high]`.

    Least squares in the order of the wanted positions: with the gaps taken off, an isotonic regression,
    by pooling adjacent violators. Where there is no room, the gaps shrink evenly.

    Args:
        wanted: positions, in any order.
        gap: least distance of two positions.
        low, high: bounds of all positions.

    >>> spread([0.5, 0.5, 0.9], 0.2, 0.0, 1.0)
    [0.4, 0.6, 0.9]
    """
    count = len(wanted)
    if count > 1:
        gap = min(gap, (high - low) / (count - 1))
    wanted = [float(x) for x in wanted]
    order = sorted(range(count), key=lambda i: wanted[i])
    pools: list[tuple[float, int]] = []  # mean, size
    for rank, i in enumerate(order):
        mean, size = wanted[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean, size = (before * members + mean * size) / (members + size), members + size
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    placed = [0.0] * count
    for rank, i in enumerate(order):
        # Clamping an isotonic fit keeps its order and solves the bounded problem.
        placed[i] = round(min(max(flat[rank], low), high - (count - 1) * gap) + rank * gap, 12)
    return placed
