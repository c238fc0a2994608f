"""Data in, `matplotlib.figure.Figure` out; `save` and `to_png` render one."""

from lq_plugin.plots.layers import bits_per_layer, sqnr_per_layer
from lq_plugin.plots.ranges import activation_histogram
from lq_plugin.plots.sensitivity import sensitivity_map
from lq_plugin.plots.study import pareto, pareto_front
from lq_plugin.plots.style import save, to_png
from lq_plugin.plots.weights import weight_box_plot

__all__ = [
    "activation_histogram",
    "bits_per_layer",
    "pareto",
    "pareto_front",
    "save",
    "sensitivity_map",
    "sqnr_per_layer",
    "to_png",
    "weight_box_plot",
]
