"""Memory of activations: the largest sum of tensors that are alive at one moment of a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import NamedTuple

from lq_plugin.intent.plan import LayerPlan
from lq_plugin.model.graph.recording import Recording
from lq_plugin.model.measure.energy import FLOAT_BITS


class _Tensor(NamedTuple):
    producer: int
    output: int


class ActivationMemory:
    """Sizes and lives of the activations of one recorded pass, for many plans.

    A tensor is alive from the call that makes it to the last one that reads it. An activation function or a batch norm
    works in place where nothing else reads its input, as runtimes fuse it. An element takes the bits of the widest
    input that reads it: 32 of a layer whose input is float, of any other operation, and of what the model returns. The
    model's own input is not counted.

    Args:
        recording: of one batch.
    """

    def __init__(self, recording: Recording) -> None:
        self._samples, self._calls = recording.samples, len(recording.calls)
        #: Elements, the calls from and to which it lives, and the names of the calls that read it.
        self._tensors: list[tuple[int, int, int, tuple[str, ...]]] = []
        readers = Counter(
            _Tensor(s.producer, s.output) for c in recording.calls for s in c.inputs if s.producer is not None
        )
        made_of: dict[_Tensor, _Tensor] = {}
        last: dict[_Tensor, int] = {}
        read_by: dict[_Tensor, list[str]] = {}
        sizes: dict[_Tensor, int] = {}
        for call in recording.calls:
            for source in call.inputs:
                if source.producer is None:
                    continue
                tensor = _Tensor(source.producer, source.output)
                tensor = made_of.get(tensor, tensor)
                last[tensor] = call.position
                in_place = call.is_activation or call.op.startswith("BatchNorm")
                if in_place and readers[_Tensor(source.producer, source.output)] == 1:
                    made_of[_Tensor(call.position, 0)] = tensor
                elif not call.passthrough:
                    read_by.setdefault(tensor, []).append(call.name)
            if call.kind != "output" and not call.passthrough:
                for index, shape in enumerate(call.output_shapes):
                    if (tensor := _Tensor(call.position, index)) not in made_of:
                        sizes[tensor] = prod(shape)
        for tensor, size in sizes.items():
            end = last.get(tensor, tensor.producer)
            self._tensors.append((size, tensor.producer, end, tuple(dict.fromkeys(read_by.get(tensor, ())))))

    def bytes(self, plans: Mapping[str, LayerPlan] | None = None) -> int:
        """Returns the bytes of one input sample at the fullest moment.

        Args:
            plans: of the layers, by name; None: everything is float.
        """
        return round(max(self.held(plans), default=0) / 8 / self._samples)

    def held(self, plans: Mapping[str, LayerPlan] | None = None) -> list[int]:
        """Returns the bits that are alive at each call, of all samples together."""
        plans = plans or {}
        # Bits that each call adds to those held; what it reads last goes before the next one.
        changes = [0] * (self._calls + 1)
        for size, start, end, readers in self._tensors:
            bits = size * max((_input_bits(plans.get(name)) for name in readers), default=FLOAT_BITS)
            changes[start] += bits
            changes[end + 1] -= bits
        return list(accumulate(changes))


def activation_bytes(recording: Recording, plans: Mapping[str, LayerPlan] | None = None) -> int:
    """Returns the bytes of activations of one input sample at the fullest moment of a pass, see `ActivationMemory`.

    Args:
        recording: of one batch.
        plans: of the layers, by name; None: everything is float.

    >>> import torch
    >>> from lq_plugin.intent.spec import QuantSpec
    >>> from lq_plugin.model.graph.record import record
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    >>> x = torch.randn(4, 8)
    >>> recording = record(net, lambda: net(x), samples=4)
    >>> activation_bytes(recording)  # 100 are read while 10 are made, 4 bytes each
    440
    >>> activation_bytes(recording, {"2": LayerPlan(input=QuantSpec.parse("uint8"))})
    140
    """
    return ActivationMemory(recording).bytes(plans)


def _input_bits(plan: LayerPlan | None) -> int:
    return FLOAT_BITS if plan is None or plan.input is None else plan.input.bit_width
