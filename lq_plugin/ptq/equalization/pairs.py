"""Pairs of layers whose channels can be scaled without changing the function, found in a recorded pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq_plugin.layers.registry import channel_axis, known_operation, layer_channels, operation_of
from lq_plugin.model.graph.record import Call, Recording
from lq_plugin.model.survey import float_class
from lq_plugin.ptq.batch_norm.fold import has_torchs_forward
from lq_plugin.ptq.own_parameters import Refused, parameter_fault

#: f(s · x) = s · f(x) for s > 0, element by element.
_HOMOGENEOUS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
_HOMOGENEOUS_OPS = (
    "relu",
    "leakyrelu",
    "prelu",
    "rrelu",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "featuredropout",
)
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
_POOL_MODULES = {
    getattr(nn, f"{kind}Pool{n}d"): n for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for n in (1, 2, 3)
}  # fmt: skip
#: Last dims that an operation pools over.
_POOL_OPS = {f"{pool}{n}d{suffix}": n for pool in _POOLS for n in (1, 2, 3) for suffix in ("", "_with_indices")}


@dataclass(frozen=True)
class EqualizationPair:
    """Two layers between which each channel can be scaled, by qualified name.

    Args:
        producer: makes the channels.
        consumer: alone reads them.
        between: what stands in between, in order; names as in the recording.
        batch_norms: the folded batch norms among these.
        repeat: inputs of the consumer for each channel, more than 1 after a flatten.
    """

    producer: str
    consumer: str
    between: tuple[str, ...] = ()
    batch_norms: tuple[str, ...] = ()
    repeat: int = 1


def find_equalization_pairs(model: nn.Module, recording: Recording) -> tuple[list[EqualizationPair], list[Refused]]:
    """Returns the layers whose output channels can be scaled, and all others with the reason.

    Safe means: both compute a product, convolution or transposed convolution (grouped, depthwise) and nothing else, as
    their quantized class declares (`QuantizedLayer.operation`), and are called once; nothing
    but the second reads what the first makes; in between stand only folded batch norms, ReLU, leaky ReLU, PReLU,
    dropout, max and average pooling, and `nn.Flatten` inside an `nn.Sequential`: elsewhere a recording cannot tell a
    flatten from a reshape that mixes channels. No weight or bias is shared or read elsewhere.

    Args:
        model: the model that was recorded.
        recording: of one float forward pass in evaluation mode.

    Returns:
        `(pairs, refused)`; together every linear and convolution as a producer, in model order.
    """
    pairs: list[EqualizationPair] = []
    refused: list[Refused] = []
    search = _Search(model, recording)
    for name, module in search.modules.items():
        if operation_of(module) is not None:
            found = search.layer_fault(name, ("weight", "bias")) or search.follow(name)
            if isinstance(found, EqualizationPair):
                pairs.append(found)
            else:
                refused.append(Refused(name, found))
    return pairs, refused


@dataclass
class _Position:
    """The place of a producer's channels: the last call, the shape of its output, the channels' dim from the end."""

    call: Call
    shape: tuple[int, ...]
    axis: int
    repeat: int = 1


class _Search:
    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model, self.recording = model, recording
        self.modules = dict(model.named_modules())

    def layer_fault(self, name: str, keys: Sequence[str]) -> str | None:
        """Returns why the parameters `keys` of a layer cannot be scaled."""
        module = self.modules[name]
        known = has_torchs_forward(module) if isinstance(module, _BatchNorm) else known_operation(module) is not None
        if not known:
            return f"{float_class(module).__name__} has a forward of its own"
        return parameter_fault(self.model, self.recording, name, keys)

    def follow(self, name: str) -> EqualizationPair | str:
        """Returns the pair that begins with a layer, or why there is none."""
        call = self.recording.calls_of(name)[0]
        at = _Position(call, call.output_shapes[0], channel_axis(self.modules[name]))
        between: list[str] = []
        batch_norms: list[str] = []
        while True:
            readers = self.recording.consumers_of(at.call)
            if len(readers) != 1:
                return f"its channels have {len(readers)} readers" + (
                    f": {', '.join(repr(r.name) for r in readers)}" if readers else ""
                )
            (reader,) = readers
            if reader.kind == "output":
                return "its output is what the model returns"
            title = f"{reader.name!r} ({reader.op}) after it"
            fault = self._arrive(reader, at, between)
            if fault is not None:
                return f"{title} {fault}"
            module = self.modules[reader.name] if reader.kind == "module" else None
            if module is not None and operation_of(module) is not None:
                fault = self.layer_fault(reader.name, ("weight",)) or self._channels_fault(module, at)
                return (
                    f"{title}: {fault}"
                    if fault
                    else EqualizationPair(name, reader.name, tuple(between), tuple(batch_norms), at.repeat)
                )
            if isinstance(module, _BatchNorm):
                if fault := self._batch_norm_fault(reader.name, module, at):
                    return f"{title}: {fault}"
                batch_norms.append(reader.name)
            elif fault := _homogeneity_fault(reader, module, at):
                return f"{title} {fault}"
            between.append(reader.name)
            at.call, at.shape = reader, reader.output_shapes[0]

    def _arrive(self, reader: Call, at: _Position, between: list[str]) -> str | None:
        """Returns why `reader` does not read the channels as they were made; moves `at` along a flatten."""
        sources = [source for source in reader.inputs if source.producer == at.call.position]
        others = [source for source in reader.inputs if source.producer != at.call.position and not source.parameters]
        if len(sources) != 1 or others or reader.inputs[0] is not sources[0] or sources[0].output != 0:
            return "reads something else also"
        if sources[0].direct:
            return None
        flattens = self._flattens(reader, at.call)
        if flattens is None:
            return "reads a view, cast or reshaped copy, whose channels the recording does not show"
        for name in flattens:
            if isinstance(module := self.modules[name], nn.Flatten):
                dims = len(at.shape)
                start, end, channel = module.start_dim % dims, module.end_dim % dims, at.axis % dims
                if (start, end) != (channel, dims - 1):
                    return f"reads what {name!r} flattens beyond a channel"
                size = math.prod(at.shape[start:])
                at.repeat, at.axis = at.repeat * (size // at.shape[start]), -1
                at.shape = (*at.shape[:start], size)
        between += flattens
        return (
            None
            if tuple(at.shape) == sources[0].shape
            else f"reads shape {list(sources[0].shape)}, not {list(at.shape)}"
        )

    def _flattens(self, reader: Call, producer: Call) -> list[str] | None:
        """Returns the modules between two calls, in order, where an `nn.Sequential` proves them to be all."""
        parent_name, _, key = reader.name.rpartition(".")
        parent = self.modules[parent_name] if reader.kind == "module" else None
        if type(parent) is not nn.Sequential or "forward" in parent.__dict__:
            return None
        found: list[str] = []
        keys = list(parent._modules)
        for child in reversed(keys[: keys.index(key)]):
            name = f"{parent_name}.{child}" if parent_name else child
            calls = self.recording.calls_of(name)
            if (
                len(calls) != 1
                or type(self.modules[name]) not in (nn.Flatten, nn.Identity, nn.Dropout)
                or not calls[0].passthrough
            ):
                return None
            found.insert(0, name)
            source = calls[0].inputs[0]
            if source.producer != producer.position or source.output != 0:
                return None
            if source.direct:
                # A hook could reshape unseen.
                hooked = any(
                    self.modules[n]._forward_pre_hooks or self.modules[n]._forward_hooks for n in (*found, reader.name)
                )
                return None if hooked else found
        return None

    def _channels_fault(self, consumer: nn.Module, at: _Position) -> str | None:
        size, axis = layer_channels(consumer)[0], channel_axis(consumer)
        if axis == at.axis and at.shape[at.axis] == size:
            return None
        return f"the channels are dim {at.axis} of its input {list(at.shape)}, it reads {size} along dim {axis}"

    def _batch_norm_fault(self, name: str, bn: _BatchNorm, at: _Position) -> str | None:
        if bn.running_mean is None or bn.running_var is None or bn.weight is None:
            return "a batch norm without running statistics or affine parameters does not pass scales on"
        gain = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
        if bool(bn.running_mean.any()) or not torch.allclose(gain, torch.ones_like(gain), atol=1e-2, rtol=0.0):
            return "the batch norm is not folded: fold_batch_norm first"
        if at.axis % len(at.shape) != 1 or at.shape[1] != bn.num_features:
            return (
                f"the channels are dim {at.axis} of its input {list(at.shape)}, it shifts {bn.num_features} along dim 1"
            )
        return self.layer_fault(name, ("bias", "weight"))


def _homogeneity_fault(call: Call, module: nn.Module | None, at: _Position) -> str | None:
    """Returns why an operation does not pass the scale of each channel on."""
    if module is not None:
        elementwise, pooled = type(module) in _HOMOGENEOUS, _POOL_MODULES.get(type(module))
    else:
        elementwise, pooled = call.op.replace("_", "") in _HOMOGENEOUS_OPS, _POOL_OPS.get(call.op)
    if elementwise:
        return None
    if pooled is None:
        return "is not known to pass channel scales on, f(s · x) = s · f(x)"
    return None if at.axis < -pooled else f"pools over the channels, dim {at.axis} of {list(at.shape)}"
