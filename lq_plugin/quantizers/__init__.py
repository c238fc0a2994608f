"""Modules with state and switches; the arithmetic is in `lq_plugin.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lq_plugin.functional.ocp_mx import ELEMENTS
from lq_plugin.intent.schedule import Moment
from lq_plugin.intent.spec import MX_FORMATS, PerGroup, QuantSpec
from lq_plugin.quantizers.activation import ActivationQuantizer as ActivationQuantizer
from lq_plugin.quantizers.base import Quantizer as Quantizer, Suspension as Suspension, Unquantized
from lq_plugin.quantizers.binary import (
    BWNWeightQuantizer as BWNWeightQuantizer,
    SignActivationQuantizer as SignActivationQuantizer,
    SignWeightQuantizer as SignWeightQuantizer,
    XNORActivationQuantizer as XNORActivationQuantizer,
)
from lq_plugin.quantizers.blockwise import (
    NVFP4ActivationQuantizer,
    NVFP4WeightQuantizer,
    OCPActivationQuantizer,
    OCPWeightQuantizer,
)
from lq_plugin.quantizers.codebook import CodebookWeightQuantizer
from lq_plugin.quantizers.learned import (
    LSQActivationQuantizer as LSQActivationQuantizer,
    LSQWeightQuantizer as LSQWeightQuantizer,
    PACTActivationQuantizer as PACTActivationQuantizer,
)
from lq_plugin.quantizers.mx import (
    MXActivationQuantizer as MXActivationQuantizer,
    MXWeightQuantizer as MXWeightQuantizer,
)
from lq_plugin.quantizers.shared_input import SharedInput as SharedInput
from lq_plugin.quantizers.ternary import (
    TTQWeightQuantizer as TTQWeightQuantizer,
    TWNWeightQuantizer as TWNWeightQuantizer,
)
from lq_plugin.quantizers.vector import VectorActivationQuantizer as VectorActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer as WeightQuantizer

#: By format; integer formats with a learned range by that.
_WEIGHT: dict[str, type[WeightQuantizer]] = {
    **dict.fromkeys(MX_FORMATS, MXWeightQuantizer),
    **dict.fromkeys(ELEMENTS, OCPWeightQuantizer),
    "nvfp4": NVFP4WeightQuantizer,
    "sign": SignWeightQuantizer,
    "bwn": BWNWeightQuantizer,
    "twn": TWNWeightQuantizer,
    "ttq": TTQWeightQuantizer,
    "kmeans": CodebookWeightQuantizer,
    "lsq": LSQWeightQuantizer,
}
_INPUT: dict[str, type[ActivationQuantizer]] = {
    **dict.fromkeys(MX_FORMATS, MXActivationQuantizer),
    **dict.fromkeys(ELEMENTS, OCPActivationQuantizer),
    "nvfp4": NVFP4ActivationQuantizer,
    "sign": SignActivationQuantizer,
    "xnor": XNORActivationQuantizer,
    "lsq": LSQActivationQuantizer,
    "pact": PACTActivationQuantizer,
}


def make_weight_quantizer(spec: QuantSpec, name: str, shape: tuple[int, ...]) -> WeightQuantizer:
    """The quantizer for a weight of this (canonical) shape."""
    return _WEIGHT.get(_key(spec), WeightQuantizer)(spec, name, shape)


def make_activation_quantizer(spec: QuantSpec, name: str, channels: int, channel_axis: int) -> ActivationQuantizer:
    """The quantizer for an activation with this many channels on this axis."""
    plain = VectorActivationQuantizer if isinstance(spec.granularity, PerGroup) else ActivationQuantizer
    return _INPUT.get(_key(spec), plain)(spec, name, channels, channel_axis)


def in_stages(
    make: Callable[[QuantSpec, str], Quantizer], name: str, stages: list[tuple[Moment | None, QuantSpec | None]]
) -> Any:
    """The quantizer of a tensor whose spec changes while it is trained.

    Args:
        make: makes a quantizer from a spec and a name.
        name: of the tensor.
        stages: when each spec comes into force; a spec of None is float. The last one is not.
    """
    *earlier, (_, last) = stages
    assert last is not None
    quantizer = make(last, name)
    if earlier:
        before = [
            make(spec, f"{name} (stage {index})") if spec else Unquantized() for index, (_, spec) in enumerate(earlier)
        ]
        quantizer.add_earlier(before, [start for start, _ in stages])
    return quantizer


def _key(spec: QuantSpec) -> str:
    return spec.range_name if spec.format_name == "int" else spec.format_name
