"""Modules with state and switches; the arithmetic is in `lq_plugin.functional`."""

from __future__ import annotations

from lq_plugin.intent.formats import Format as Format
from lq_plugin.quantizers import (  # noqa: F401 - importing registers their formats
    blockwise,
    codebook,
    fp8,
    half_scale,
    if4,
    mx,
    seq,
)
from lq_plugin.quantizers.activation import ActivationQuantizer as ActivationQuantizer
from lq_plugin.quantizers.base import Quantizer as Quantizer, Suspension as Suspension
from lq_plugin.quantizers.binary import (
    BWNWeightQuantizer as BWNWeightQuantizer,
    SignActivationQuantizer as SignActivationQuantizer,
    SignWeightQuantizer as SignWeightQuantizer,
    XNORActivationQuantizer as XNORActivationQuantizer,
)
from lq_plugin.quantizers.dynamic import DynamicActivationQuantizer as DynamicActivationQuantizer
from lq_plugin.quantizers.integer import INTEGER_STORAGE as INTEGER_STORAGE, integer_container as integer_container
from lq_plugin.quantizers.learned import (
    LSQActivationQuantizer as LSQActivationQuantizer,
    LSQWeightQuantizer as LSQWeightQuantizer,
    PACTActivationQuantizer as PACTActivationQuantizer,
)
from lq_plugin.quantizers.learned_ranges import register_learned_range as register_learned_range
from lq_plugin.quantizers.mx import (
    MXActivationQuantizer as MXActivationQuantizer,
    MXWeightQuantizer as MXWeightQuantizer,
)
from lq_plugin.quantizers.registry import (
    Container as Container,
    FloatContainer as FloatContainer,
    Part as Part,
    Storage as Storage,
    make_activation_quantizer as make_activation_quantizer,
    make_weight_quantizer as make_weight_quantizer,
    register_format as register_format,
)
from lq_plugin.quantizers.shared_input import SharedInput as SharedInput
from lq_plugin.quantizers.slot import SlotQuantizer as SlotQuantizer
from lq_plugin.quantizers.staged import StagedQuantizer as StagedQuantizer, in_stages as in_stages
from lq_plugin.quantizers.ternary import (
    TTQWeightQuantizer as TTQWeightQuantizer,
    TWNWeightQuantizer as TWNWeightQuantizer,
)
from lq_plugin.quantizers.vector import VectorActivationQuantizer as VectorActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer as WeightQuantizer
from lq_plugin.utilities.moved import former_names

__getattr__ = former_names(__name__)
