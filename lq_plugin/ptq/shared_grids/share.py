"""Quantizers that read one tensor get one scale and zero point, as runtimes of integers hold it.

In a residual block a convolution and the sum read the same tensor, each through a quantizer of its own. Where the sum
reads it padded with zeros or pooled, the two see other values and find other ranges. A file of an integer runtime has
this tensor once, on one grid: the other reader rounds what is rounded already, and differs from the model, whose
quantizers both read the float tensor, by one step now and then. In a ResNet-20 of 8 bits that is 20 % of the inputs of
the layer after the first padded shortcut, and 36 % of the logits. Here the quantizer that reads the tensor as it is
hands its range to the others; where all read it moved, none has seen all of it, and they keep theirs.

Lifecycle: once, after `calibrate` and before biases are rounded. Quantizers of other levels, of several scales or of a
range at run time keep theirs, and so do those of layers that are called more than once or read several tensors. The
model's own input is never shared: a recording knows tensors by the call that made them, and no call made this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lq_plugin.model.graph.record import Recording
from lq_plugin.model.graph.recording import Call, Source
from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.quantizers import ActivationQuantizer, SlotQuantizer

#: Functions, and torch's modules, whose results are values of what they read, or 0. Views have no call of their own.
_MOVES = frozenset(
    ("pad", "ZeroPad2d", "ZeroPad1d", "max_pool2d", "MaxPool2d", "max_pool1d", "MaxPool1d", "pixel_shuffle",
     "PixelShuffle", "channel_shuffle", "ChannelShuffle")
)  # fmt: skip


@dataclass(frozen=True)
class SharedGrids:
    """The result of `share_grids`.

    Args:
        changed: quantizers that have another range now, each with the one that it is from, by name.
    """

    changed: dict[str, str]


def share_grids(model: nn.Module, recording: Recording) -> SharedGrids:
    """Gives quantizers that read one tensor one range, in place.

    Args:
        model: prepared and calibrated.
        recording: of one pass of it, float or quantized, which shows who reads what.

    >>> import lq_plugin
    >>> from lq_plugin.model.graph.record import record
    >>> class Two(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)
    ...     def forward(self, x):
    ...         x = self.first(x)
    ...         return self.a(x), self.b(nn.functional.max_pool2d(x, 2))
    >>> net, x = Two().eval(), torch.randn(8, 2, 4, 4)
    >>> _ = lq_plugin.prepare(net, "w8a8")
    >>> _ = lq_plugin.calibrate(net, [x])
    >>> share_grids(net, record(net, lambda: net(x))).changed
    {'b.input': 'a.input'}
    """
    groups: dict[tuple[int, int], list[tuple[bool, ActivationQuantizer]]] = {}
    for quantizer, source in _reads(model, recording):
        moved, origin = _origin(recording, source)
        if origin.producer is not None:
            groups.setdefault((origin.producer, origin.output), []).append((moved, quantizer))
    changed = {}
    for group in groups.values():
        # Of each kind of levels, the first in the model's order that reads the tensor as it is gives its range.
        givers: list[ActivationQuantizer] = []
        for moved, quantizer in sorted(group, key=lambda each: each[0]):
            giver = next((one for one in givers if _alike(one, quantizer)), None)
            if giver is None and not moved:
                givers.append(quantizer)
            elif giver is not None and _differ(giver, quantizer):
                _hand_over(giver, quantizer)
                changed[quantizer.name] = giver.name
    return SharedGrids(changed)


def _reads(model: nn.Module, recording: Recording) -> Iterator[tuple[ActivationQuantizer, Source]]:
    """Yields input quantizers and what they read, those of what is called once.

    Not those of layers of several inputs, as one quantizer of `nn.Bilinear` serves two, nor those of the weights of an
    LSTM, most of which read a hidden state.
    """
    for name, layer in quantized_layers(model):
        calls = recording.calls_of(name)
        own = len(calls) == 1 and calls[0].name == name and len(calls[0].inputs) == 1
        if layer.input_quantizer is not None and own:
            yield from _current(layer.input_quantizer, calls[0].inputs[0])
    unary = recording.unary_calls
    for name, operation in quantized_operations(model):
        found = (unary[name][1],) if name in unary else recording.calls_of(name)
        if len(found) == 1:
            for index, quantizer in zip(operation.operation.operands, operation.quantizers(), strict=True):
                yield from _current(quantizer, found[0].inputs[index])


def _current(quantizer: Any, source: Source) -> Iterator[tuple[ActivationQuantizer, Source]]:
    now = quantizer.current if isinstance(quantizer, SlotQuantizer) else None
    if isinstance(now, ActivationQuantizer):
        yield now, source


def _origin(recording: Recording, source: Source) -> tuple[bool, Source]:
    """Returns the tensor that a source is moved from, and whether it is not that very tensor."""
    moved = not source.direct
    while source.producer is not None and _is_move(call := recording.calls[source.producer]):
        # Quantizers of operations stand between in a pass of the prepared model, and move nothing.
        moved = moved or call.op in _MOVES
        source = call.inputs[0]
    return moved, source


def _is_move(call: Call) -> bool:
    moves = call.pads_zeros if call.op == "pad" else call.op in _MOVES
    return bool(call.inputs) and (moves or ".quantized_operations." in f".{call.name}")


def _alike(one: ActivationQuantizer, other: ActivationQuantizer) -> bool:
    """Returns True for two of the same levels with one fixed scale each."""
    same = type(one) is type(other) and one.spec.is_uniform and other.spec.is_uniform
    if not same or one.spec.dynamic or other.spec.dynamic:
        return False
    return one.spec.grid == other.spec.grid and one.scale.numel() == other.scale.numel() == 1


def _differ(one: ActivationQuantizer, other: ActivationQuantizer) -> bool:
    return not (torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point))


def _hand_over(one: ActivationQuantizer, other: ActivationQuantizer) -> None:
    """Gives one quantizer's range to another, with what it learns it from."""
    given, taken = dict(one.state_dict(keep_vars=True)), other.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in taken.items():
            if key in given and value.is_floating_point():
                value.copy_(given[key])
