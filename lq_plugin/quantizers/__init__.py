"""Modules with state and switches; the arithmetic is in `lq_plugin.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lq_plugin.intent.formats import Format as Format
from lq_plugin.intent.schedule import Moment
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers import (  # noqa: F401 - importing registers their formats
    blockwise,
    codebook,
    fp8,
    half_scale,
    mx,
    seq,
)
from lq_plugin.quantizers.activation import ActivationQuantizer as ActivationQuantizer
from lq_plugin.quantizers.base import Quantizer as Quantizer, Suspension as Suspension, Unquantized
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
from lq_plugin.quantizers.ternary import (
    TTQWeightQuantizer as TTQWeightQuantizer,
    TWNWeightQuantizer as TWNWeightQuantizer,
)
from lq_plugin.quantizers.vector import VectorActivationQuantizer as VectorActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer as WeightQuantizer


def in_stages(
    make: Callable[[QuantSpec, str], Quantizer], name: str, stages: list[tuple[Moment | None, QuantSpec | None]]
) -> Any:
    """Returns the quantizer of a tensor whose spec changes during training.

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
