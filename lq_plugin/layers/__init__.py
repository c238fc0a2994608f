"""Quantized layers, one short file per family; importing this registers them."""

from lq_plugin.layers.base import QuantizedLayer, ShadowedForward, attach_quantizers, detach_quantizers
from lq_plugin.layers.conv import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from lq_plugin.layers.embedding import QuantizedEmbedding
from lq_plugin.layers.linear import QuantizedConv1D, QuantizedLinear
from lq_plugin.layers.registry import quantized_class, register_layer, why_unsupported

__all__ = [
    "QuantizedConv1D",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedLayer",
    "QuantizedLinear",
    "ShadowedForward",
    "attach_quantizers",
    "detach_quantizers",
    "quantized_class",
    "register_layer",
    "why_unsupported",
]
