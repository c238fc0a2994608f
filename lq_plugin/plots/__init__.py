"""Functions from data to a `matplotlib.figure.Figure`; `save` and `to_png` render one.

matplotlib is imported when one of them is first used; `pip install "lq_plugin[plots]"` brings it.
"""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.plots.layers import bits_per_layer as bits_per_layer, sqnr_per_layer as sqnr_per_layer
    from lq_plugin.plots.ranges import activation_histogram as activation_histogram
    from lq_plugin.plots.sensitivity import sensitivity_map as sensitivity_map
    from lq_plugin.plots.study import pareto as pareto
    from lq_plugin.plots.style import save as save, to_png as to_png
    from lq_plugin.plots.weights import weight_box_plot as weight_box_plot
    from lq_plugin.utilities.front import pareto_front as pareto_front

_DRAW = ("layers", "ranges", "sensitivity", "study", "style", "weights")
__getattr__, __dir__, __all__ = attributes(
    __name__, __file__, {f"{__name__}.{module}": ("matplotlib",) for module in _DRAW}
)
