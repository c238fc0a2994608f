"""Pictures of a format's levels, computed by the library's own quantizers.

Each picture shows the staircase x → x̂ of a tensor that is quantized as the spec says, over the tensor's histogram.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from lq_plugin import QuantSpec
from lq_plugin.intent.granularity import PerGroup
from lq_plugin.plots.style import STYLE
from lq_plugin.quantizers import make_activation_quantizer, make_weight_quantizer

#: Ink, lines and bars on the site's light and dark background.
COLOURS = {"light": ("#222222", "#D55E00", "#9CC3DD"), "dark": ("#E2E4E9", "#FF9A4D", "#35607D")}
#: More levels than that are not drawn as lines of their own.
SHOWN_LEVELS = 40


@dataclass(frozen=True)
class Staircase:
    """A tensor in ascending order, and what a format makes of it.

    Args:
        x: values.
        x_hat: the quantized values.
    """

    x: Tensor
    x_hat: Tensor

    @property
    def levels(self) -> Tensor:
        """Distinct quantized values, in ascending order."""
        return self.x_hat.unique()


def staircase(text: str) -> Staircase:
    """Returns the staircase of a spec.

    A tensor of 4,096 normal numbers is one row, so that tensor and channel are the same. In a format of blocks each
    block holds its largest number, 1.75, next to evenly spaced ones, so that all have the same scale; a block of more
    than 32 elements is one by itself.

    Args:
        text: a spec, as plans have it.
    """
    spec = QuantSpec.parse(text)
    if isinstance(spec.granularity, PerGroup):
        x = _blocks(spec.granularity.group_size)
    else:
        x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
        if spec.has_grid and not spec.grid.signed and not spec.grid.affine:
            x = x.clamp(min=0)  # as after a ReLU
    with torch.no_grad():
        if "weight" in spec.kind.slots:
            quantizer = make_weight_quantizer(spec, text, tuple(x.shape)).eval()
            quantizer.calibrate(x)
        else:
            quantizer = make_activation_quantizer(spec, text, 2, 1).eval()
        x_hat = quantizer(x)
    order = x.flatten().argsort()
    return Staircase(x.flatten()[order], x_hat.flatten()[order])


def _blocks(size: int) -> Tensor:
    """Returns blocks `[rows, size]` of the same largest magnitude; it is positive, and no power of two."""
    if size > 32:
        return torch.linspace(-1.74, 1.75, size)[None]
    # Neighbours are equal, as a microexponent is shared by two.
    values = torch.linspace(-1.74, 1.74, 100 * (size // 2 - 1)).repeat_interleave(2).reshape(100, size - 2)
    return torch.cat([torch.full((100, 2), 1.75), values], 1)


def draw(text: str, theme: str) -> str:
    """Returns the picture of a spec's levels as SVG.

    Args:
        text: a spec, as plans have it.
        theme: a key of `COLOURS`.
    """
    ink, line, bar = COLOURS[theme]
    found = staircase(text)
    style = STYLE | {
        "svg.hashsalt": text, "svg.fonttype": "path", "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink,
        "xtick.color": ink, "ytick.color": ink, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.twinx()
        bars.hist(found.x, bins=80, color=bar, alpha=0.6)
        bars.set_axis_off()
        axes.set_zorder(bars.get_zorder() + 1)
        axes.patch.set_visible(False)
        levels = found.levels
        if len(levels) <= SHOWN_LEVELS:
            for level in levels.tolist():
                axes.axhline(level, color=ink, alpha=0.25, linewidth=0.6)
        axes.plot(found.x, found.x_hat, color=line, linewidth=1.5, drawstyle="steps-mid")
        axes.set_xlabel("x, and how often it occurs")
        axes.set_ylabel("x̂")
        axes.set_title(f"{text}: {len(levels)} levels")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]
