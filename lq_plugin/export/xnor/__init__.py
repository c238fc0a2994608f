"""Inference of binary weights and inputs by XNOR and popcount."""

from lq_plugin.export.xnor.layers import use_xnor as use_xnor, xnor_layer as xnor_layer
