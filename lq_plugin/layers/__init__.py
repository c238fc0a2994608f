"""Quantized layers, one short file per family; importing this registers them."""

from lq_plugin.layers.base import (
    QuantizedLayer as QuantizedLayer,
    ShadowedForward as ShadowedForward,
    attach_quantizers as attach_quantizers,
    current_weight_quantizer as current_weight_quantizer,
    detach_quantizers as detach_quantizers,
    leave_out as leave_out,
    put_back as put_back,
)
from lq_plugin.layers.bilinear import QuantizedBilinear as QuantizedBilinear
from lq_plugin.layers.compound.attention import QuantizedAttention as QuantizedAttention
from lq_plugin.layers.compound.attention_products import attention_with as attention_with
from lq_plugin.layers.compound.base import (
    CONTAINER as CONTAINER,
    OPERATIONS_CONTAINER as OPERATIONS_CONTAINER,
    CompoundWeight as CompoundWeight,
    QuantizedCompound as QuantizedCompound,
    StateWeight as StateWeight,
    added_slots as added_slots,
    compound_container as compound_container,
    compound_family as compound_family,
    compound_weights as compound_weights,
    computes_inside as computes_inside,
    leave_compound as leave_compound,
    register_compound as register_compound,
    show_steps as show_steps,
    swapped_compound as swapped_compound,
    weight_key as weight_key,
    why_unsupported_compound as why_unsupported_compound,
)
from lq_plugin.layers.compound.inside import changes as changes, pass_on as pass_on, unchanged as unchanged
from lq_plugin.layers.compound.own_weights import (
    OwnWeight as OwnWeight,
    OwnWeights as OwnWeights,
    UnseenExpertsError as UnseenExpertsError,
    own_weights as own_weights,
)
from lq_plugin.layers.compound.products_in_code import register_products as register_products
from lq_plugin.layers.compound.recurrent import QuantizedRecurrent as QuantizedRecurrent
from lq_plugin.layers.compound.recurrent_cells import QuantizedCell as QuantizedCell
from lq_plugin.layers.compound.weight_in_use import WeightInUse as WeightInUse, weight_in_use as weight_in_use
from lq_plugin.layers.conv import (
    QuantizedConv1d as QuantizedConv1d,
    QuantizedConv2d as QuantizedConv2d,
    QuantizedConv3d as QuantizedConv3d,
    QuantizedConvTranspose1d as QuantizedConvTranspose1d,
    QuantizedConvTranspose2d as QuantizedConvTranspose2d,
    QuantizedConvTranspose3d as QuantizedConvTranspose3d,
)
from lq_plugin.layers.embedding import (
    QuantizedEmbedding as QuantizedEmbedding,
    QuantizedEmbeddingBag as QuantizedEmbeddingBag,
)
from lq_plugin.layers.linear import QuantizedConv1D as QuantizedConv1D, QuantizedLinear as QuantizedLinear
from lq_plugin.layers.parametrized import (
    COMPUTED as COMPUTED,
    class_before as class_before,
    computed_faults as computed_faults,
    weight_is_computed as weight_is_computed,
    weight_of as weight_of,
    weight_parts as weight_parts,
    weight_sources as weight_sources,
)
from lq_plugin.layers.registry import (
    names_taken as names_taken,
    quantized_class as quantized_class,
    register_layer as register_layer,
    weight_shape as weight_shape,
    why_unsupported as why_unsupported,
)
from lq_plugin.layers.shared_inputs import share_inputs as share_inputs, unshare_inputs as unshare_inputs
