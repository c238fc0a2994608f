"""Modules with state and switches; the arithmetic is in `lq_plugin.functional`."""

from __future__ import annotations

from lq_plugin.quantizers.base import Quantizer
from lq_plugin.quantizers.learned import LSQInputQuantizer, LSQWeightQuantizer, PACTInputQuantizer
from lq_plugin.quantizers.mx import MXInputQuantizer, MXWeightQuantizer
from lq_plugin.quantizers.uniform import InputQuantizer, WeightQuantizer
from lq_plugin.quantizers.vector import VectorInputQuantizer
from lq_plugin.spec import MX_FORMATS, PerGroup, QuantSpec

_WEIGHT = {"lsq": LSQWeightQuantizer}
_INPUT = {"lsq": LSQInputQuantizer, "pact": PACTInputQuantizer}


def make_weight_quantizer(spec: QuantSpec, name: str, shape: tuple[int, ...]) -> WeightQuantizer:
    """The quantizer for a weight of this (canonical) shape."""
    kind = MXWeightQuantizer if spec.format in MX_FORMATS else _WEIGHT.get(spec.range_name, WeightQuantizer)
    return kind(spec, name, shape)


def make_input_quantizer(spec: QuantSpec, name: str, channels: int, channel_axis: int) -> InputQuantizer:
    """The quantizer for an activation with this many channels on this axis."""
    if spec.format in MX_FORMATS:
        return MXInputQuantizer(spec, name, channels, channel_axis)
    kind = VectorInputQuantizer if isinstance(spec.granularity, PerGroup) else _INPUT.get(spec.range_name, InputQuantizer)
    return kind(spec, name, channels, channel_axis)


__all__ = [
    "InputQuantizer",
    "LSQInputQuantizer",
    "LSQWeightQuantizer",
    "MXInputQuantizer",
    "MXWeightQuantizer",
    "PACTInputQuantizer",
    "Quantizer",
    "VectorInputQuantizer",
    "WeightQuantizer",
    "make_input_quantizer",
    "make_weight_quantizer",
]
