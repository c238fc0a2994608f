"""Quantized layers, one short file per family; importing this registers them."""

from lq_plugin.layers.attention import QuantizedAttention
from lq_plugin.layers.base import QuantizedLayer, ShadowedForward, attach_quantizers, detach_quantizers
from lq_plugin.layers.compound import (
    CONTAINER,
    CompoundWeight,
    QuantizedCompound,
    compound_family,
    compound_weights,
    register_compound,
    swapped_compound,
    weight_key,
    why_unsupported_compound,
)
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
from lq_plugin.layers.parametrized import (
    COMPUTED,
    class_before,
    computed_faults,
    weight_is_computed,
    weight_of,
    weight_parts,
    weight_sources,
)
from lq_plugin.layers.recurrent import QuantizedRecurrent
from lq_plugin.layers.registry import names_taken, quantized_class, register_layer, why_unsupported
from lq_plugin.layers.siblings import share_inputs, unshare_inputs

__all__ = [
    "COMPUTED",
    "CONTAINER",
    "CompoundWeight",
    "QuantizedAttention",
    "QuantizedCompound",
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
    "QuantizedRecurrent",
    "ShadowedForward",
    "attach_quantizers",
    "class_before",
    "compound_family",
    "compound_weights",
    "computed_faults",
    "detach_quantizers",
    "names_taken",
    "quantized_class",
    "register_compound",
    "register_layer",
    "share_inputs",
    "swapped_compound",
    "unshare_inputs",
    "weight_is_computed",
    "weight_key",
    "weight_of",
    "weight_parts",
    "weight_sources",
    "why_unsupported",
    "why_unsupported_compound",
]
