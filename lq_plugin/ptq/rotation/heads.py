"""Pairs of value and output projections, between which a rotation of each attention head folds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lq_plugin.model.graph.record import Call, Recording
from lq_plugin.ptq.own_parameters import Refused
from lq_plugin.ptq.rotation.streams import is_linear, parameters_fault

#: Place of the values among the tensors that the function is given.
_VALUES = {"scaled_dot_product_attention": 2, "matmul": 1}


@dataclass(frozen=True)
class HeadPair:
    """A value projection and the output projection that alone reads its heads, by qualified name.

    Args:
        value: its output holds heads of `size` channels.
        output: its input holds heads of `size` channels, as many or more (grouped queries).
        size: channels of a head.
    """

    value: str
    output: str
    size: int


def find_head_pairs(model: nn.Module, recording: Recording) -> tuple[list[HeadPair], list[Refused]]:
    """Returns the pairs, and what looks like one with the reason why it is none.

    That heads lie side by side in the channels of both layers is not seen here: the caller proves it by running them.

    Args:
        model: the model that was recorded.
        recording: of one float pass.
    """
    modules = dict(model.named_modules())
    pairs: list[HeadPair] = []
    refused: list[Refused] = []
    readers = {
        name: call.name
        for call in recording.calls
        if call.kind != "module"
        for source in call.inputs
        for name in source.parameters
    }
    for attention in recording.calls:
        place = _VALUES.get(attention.op)
        if place is None or len(attention.inputs) <= place:
            continue
        made = recording.producer_of(attention, place)
        consumers = recording.consumers_of(attention)
        if made is None or made.kind != "module" or not is_linear(modules.get(made.name)):
            continue
        if len(consumers) != 1 or consumers[0].kind != "module" or not is_linear(modules.get(consumers[0].name)):
            continue
        pair = HeadPair(made.name, consumers[0].name, attention.inputs[place].shape[-1])
        fault = _fault(recording, attention, made, consumers[0], pair)
        fault = fault or next(
            (f for name in (pair.value, pair.output) if (f := parameters_fault(model, recording, name, readers))), None
        )
        if fault is None:
            pairs.append(pair)
        else:
            refused.append(Refused(pair.value, fault))
    return pairs, refused


def _fault(recording: Recording, attention: Call, made: Call, output: Call, pair: HeadPair) -> str | None:
    if len(recording.consumers_of(made)) != 1:
        return "its output is also read elsewhere"
    if sum(source.producer == made.position for source in attention.inputs) != 1:
        return f"{attention.name!r} reads it as more than the values"
    for call, channels in ((made, made.output_shapes[0][-1]), (output, output.inputs[0].shape[-1])):
        if channels % pair.size:
            return f"{call.name!r} has {channels} channels, no multiple of the {pair.size} of a head"
    return None
