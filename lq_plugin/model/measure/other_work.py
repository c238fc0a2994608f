"""Products of a pass that belong to no layer that can hold quantizers: attention, functional calls, other modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lq_plugin.intent.plan import LayerPlan
from lq_plugin.model.graph.numbering import ATTENTION, CACHED, part_of
from lq_plugin.model.graph.recording import Call, Recording
from lq_plugin.model.measure.energy import FLOAT_BITS, mac_energy
from lq_plugin.model.survey import Survey


class Product(NamedTuple):
    """Multiply-accumulates of one input sample, with the bits of both factors."""

    macs: int
    left: int
    right: int

    @property
    def bops(self) -> int:
        """Bit operations."""
        return self.macs * self.left * self.right

    @property
    def energy(self) -> float:
        """Microjoules."""
        return self.macs * mac_energy(self.left, self.right)


def other_work(survey: Survey, plans: Mapping[str, LayerPlan], recording: Recording) -> list[Product]:
    """Returns the products outside of the layers that can hold quantizers.

    Args:
        survey: of the model.
        plans: by name of layer or recorded operation.
        recording: of one batch.
    """
    return [
        Product(work, *_factor_bits(recording.calls_of(name)[0], name, plans))
        for name, work in recording.sample_macs.items()
        if name not in survey.candidates
    ]


def _factor_bits(call: Call, name: str, plans: Mapping[str, LayerPlan]) -> tuple[int, int]:
    """Bits of the two factors of a product that no layer owns; what holds no quantizer is float.

    Of the two products of an attention kernel, the wider one's.
    """
    spec = plans.get(name, LayerPlan()).input
    bits = spec.bit_width if spec and (call.operands or call.kind == "module") else FLOAT_BITS
    if call.op != ATTENTION or len(call.operands) < 3:
        return bits, bits if call.fully_quantizable else FLOAT_BITS
    inside = {part: plans.get(part_of(name, part), LayerPlan()).input for part in ("probabilities", *CACHED)}
    probabilities, keys, values = (found.bit_width if found else None for found in inside.values())
    return max((bits, keys or bits), (probabilities or FLOAT_BITS, values or bits), key=math.prod)
