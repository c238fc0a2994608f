"""Norms and linear layers whose channels can be scaled, found in a recorded pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lq_plugin.layers.registry import canonical_of, known_operation, operation_of
from lq_plugin.model.graph.record import Call, Recording
from lq_plugin.model.survey import float_class
from lq_plugin.ptq.own_parameters import Refused, parameter_fault

_NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


@dataclass(frozen=True)
class SmoothingGroup:
    """The layer that makes some channels, and all that read them, by qualified name.

    Args:
        producer: a norm, or a linear layer.
        readers: linear layers and self-attentions, in the order in which they run.
    """

    producer: str
    readers: tuple[str, ...]


def find_smoothing_groups(model: nn.Module, recording: Recording) -> tuple[list[SmoothingGroup], list[Refused]]:
    """Returns the norms and linear layers whose output channels can be scaled, and all others with the reason.

    Safe means: called once, with a weight (and bias) of its own that nothing else reads; its output, as it is, is read
    by linear layers and by self-attentions (as query, key and value) alone, each called once with a weight of its own.
    Dropout and `nn.Identity` may stand in between. A norm's channels must be the last dim.

    Args:
        model: the model that was recorded.
        recording: of one float forward pass in evaluation mode.

    Returns:
        `(groups, refused)`, in the order in which producers ran, those that did not last.
    """
    search = _Search(model, recording)
    groups: list[SmoothingGroup] = []
    refused: list[Refused] = []
    inside = tuple(f"{name}." for name, module in search.modules.items() if isinstance(module, nn.MultiheadAttention))
    candidates = [
        name
        for name, m in search.modules.items()
        if (isinstance(m, _NORMS) or _is_linear(m)) and not name.startswith(inside)
    ]
    first = {call.name: call.position for call in reversed(recording.calls) if call.kind == "module"}
    for name in sorted(candidates, key=lambda name: first.get(name, len(recording.calls))):
        found = search.group(name)
        if isinstance(found, SmoothingGroup):
            groups.append(found)
        else:
            refused.append(Refused(name, found))
    return groups, refused


def input_weight(module: nn.Module) -> str:
    """Returns the key of the weight that multiplies a reader's input."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def input_dim(module: nn.Module) -> int:
    """Returns the dim of a reader's weight that runs along its input; HF `Conv1D` has `[C_in, C_out]`."""
    if isinstance(module, nn.MultiheadAttention):
        return 1
    probe = canonical_of(module, torch.empty(2, 3, device="meta"))
    return 1 if probe.shape[1] == 3 else 0


class _Search:
    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model, self.recording = model, recording
        self.modules = dict(model.named_modules())

    def group(self, name: str) -> SmoothingGroup | str:
        """Returns the group that a norm or linear layer begins, or why there is none."""
        module = self.modules[name]
        if not _is_linear(module) and getattr(module, "weight", None) is None:
            return "it has no affine weight that could take the factors"
        if fault := self._layer_fault(name, ("weight", "bias")):
            return fault
        call = self.recording.calls_of(name)[0]
        if fault := _channels_fault(module, call):
            return fault
        readers = self.recording.consumers_of(call)
        if not readers:
            return "nothing reads its output"
        for reader in readers:
            if reader.kind == "output":
                return "its output is what the model returns"
            if fault := self._reader_fault(reader, call):
                return f"{reader.name!r} ({reader.op}) reads it, {fault}"
        return SmoothingGroup(name, tuple(reader.name for reader in readers))

    def _reader_fault(self, reader: Call, producer: Call) -> str | None:
        module = self.modules[reader.name] if reader.kind == "module" else None
        if module is None or not (_is_linear(module) or isinstance(module, nn.MultiheadAttention)):
            return "which is no linear layer"
        sources = [source for source in reader.inputs if source.producer == producer.position]
        if any(not source.direct or source.output for source in sources):
            return "but through a view, cast or reshaped copy, whose channels the recording does not show"
        if isinstance(module, nn.MultiheadAttention):
            if not module._qkv_same_embed_dim:
                return "but its key and value have a size of their own"
            if len(sources) != 3:
                return "but not as all of query, key and value"
        fault = self._layer_fault(reader.name, (input_weight(module),))
        return f"but {fault}" if fault else None

    def _layer_fault(self, name: str, keys: tuple[str, ...]) -> str | None:
        """Returns why the parameters `keys` of a module cannot be scaled."""
        module = self.modules[name]
        kind = float_class(module)
        plain = kind in (*_NORMS, nn.MultiheadAttention) and "forward" not in module.__dict__
        if not plain and known_operation(module) != "product":
            return f"{kind.__name__} has a forward of its own"
        return parameter_fault(self.model, self.recording, name, keys)


def _is_linear(module: nn.Module) -> bool:
    return operation_of(module) == "product"


def _channels_fault(module: nn.Module, call: Call) -> str | None:
    """Returns why a norm's weight is not one number for each element of the last dim, which linear layers read."""
    shape = call.output_shapes[0]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return (
            None
            if len(module.normalized_shape) == 1
            else f"it normalizes {list(module.normalized_shape)}, more than the last dim"
        )
    if isinstance(module, (_NormBase, nn.GroupNorm)) and (len(shape) != 2 or isinstance(module, _InstanceNorm)):
        return f"its channels are not the last dim of {list(shape)}"
    return None
