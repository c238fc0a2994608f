"""The door for figures: `register_picture` adds one to the files that `write_pictures` and `lq-report` write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from lq_plugin.errors import QuantizationError
from lq_plugin.report.data import LayerReport, ReportData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OfReport: TypeAlias = "Callable[[ReportData], Figure | None]"
OfLayer: TypeAlias = "Callable[[LayerReport], Figure | None]"
_Function = TypeVar("_Function", OfReport, OfLayer)

#: Functions of a report by the name of their figure, in the order in which figures are written.
PICTURES: dict[str, OfReport] = {}
#: Functions of a layer, by the beginning of the name of their figures.
LAYER_PICTURES: dict[str, OfLayer] = {}


def register_picture(name: str) -> Callable[[OfReport], OfReport]:
    """Returns a decorator that makes a function of a `ReportData` a figure of each report.

    The function returns a `matplotlib.figure.Figure`, best made by `lq_plugin.plots.style.new_figure` in a function
    decorated with `lq_plugin.plots.style.styled`; or None where the report has nothing to draw.

    Args:
        name: of the figure and of its files; a name that is taken is replaced.

    >>> from lq_plugin.plots.style import new_figure, styled
    >>> @register_picture("bytes")
    ... @styled
    ... def layer_bytes(report):
    ...     if report.model is None:
    ...         return None
    ...     figure, axes = new_figure(8.0, 3.0)
    ...     axes.bar([layer.name for layer in report.model.layers], [layer.bytes for layer in report.model.layers])
    ...     return figure
    >>> PICTURES.pop("bytes")(ReportData("a report without a model")) is None
    True
    """
    return _adding(PICTURES, name)


def register_layer_picture(name: str) -> Callable[[OfLayer], OfLayer]:
    """Returns a decorator that makes a function of a `LayerReport` a figure of each of the largest layers.

    Args:
        name: figures are called `<name>_<layer>`; a name that is taken is replaced. See `register_picture` for the
            function.
    """
    return _adding(LAYER_PICTURES, name)


def registered_pictures(report: ReportData, max_layers: int = 8) -> Iterator[tuple[str, Figure]]:
    """Yields the name and the figure of everything that is registered and that a report has values for.

    Args:
        report: to draw.
        max_layers: the figures of layers are drawn for that many, the largest that have a weight to show.

    Raises:
        QuantizationError: a registered function returned neither a figure nor None.
    """
    for name, draw in PICTURES.items():
        yield from _checked(name, draw(report))
    layers = [] if report.model is None else [layer for layer in report.model.layers if layer.boxes]
    largest = sorted(layers, key=lambda layer: -layer.elements)[:max_layers]
    for layer in (layer for layer in layers if layer in largest):
        for name, draw_layer in LAYER_PICTURES.items():
            yield from _checked(f"{name}_{layer.name}", draw_layer(layer))


def _adding(registry: dict[str, _Function], name: str) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        registry[name] = function
        return function

    return decorate


def _checked(name: str, figure: Figure | None) -> Iterator[tuple[str, Figure]]:
    if figure is None:
        return
    from matplotlib.figure import Figure

    if not isinstance(figure, Figure):
        raise QuantizationError(f"picture {name!r} is a matplotlib Figure or None, got {type(figure).__name__}")
    yield name, figure
