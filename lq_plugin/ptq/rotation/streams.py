"""Residual streams of pre-norm transformers, found in a recorded pass.

A stream is what sums of `x + f(norm(x))` are made of. It can be rotated where linear layers and embeddings alone write
it, and norms alone read it whose output linear layers alone read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq_plugin.functional.rotation import random_rotation
from lq_plugin.layers.registry import operation_of
from lq_plugin.model.graph.record import Recording, default_is_leaf
from lq_plugin.model.survey import float_class
from lq_plugin.ptq.own_parameters import Refused, parameter_fault, sharing_fault

#: Norms of transformers compute in float32 whatever they are given.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Stream:
    """A residual stream, by qualified names.

    Args:
        size: of its last dim.
        writers: linear layers and embeddings whose output is added to it, and parameters that are.
        norms: that read it, each with the linear layers that read the norm.
        keeps_mean: a norm subtracts the mean, so that the rotation has to keep it.
    """

    size: int
    writers: tuple[str, ...]
    norms: tuple[tuple[str, tuple[str, ...]], ...]
    keeps_mean: bool


def is_leaf(module: nn.Module) -> bool:
    """Returns whether recordings for rotations do not look into a module.

    Norms of transformers have classes of their own, whose forward is arithmetic.
    """
    return default_is_leaf(module) or is_norm(module)


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module may be a norm of the last dim: one weight, perhaps a bias, and "norm" in its name."""
    if next(module.children(), None) is not None or "norm" not in float_class(module).__name__.lower():
        return False
    parameters = dict(module.named_parameters(recurse=False))
    return set(parameters) <= {"weight", "bias"} and all(tensor.dim() == 1 for tensor in parameters.values())


def is_linear(module: nn.Module | None) -> bool:
    """Returns whether a module multiplies the last dim of its input by a matrix."""
    return module is not None and operation_of(module) == "product"


def find_streams(model: nn.Module, recording: Recording) -> tuple[list[Stream], list[Refused]]:
    """Returns the residual streams that can be rotated, and the others with the reason.

    Args:
        model: the model that was recorded.
        recording: of one float pass, with `is_leaf` of this file.
    """
    found: list[Stream] = []
    refused: list[Refused] = []
    for sums in _connected_sums(recording):
        search = _Search(model, recording, sums)
        if not search.norms:
            continue  # sums that no norm reads: masks of attention, biases
        fault = search.fault()
        if fault is None:
            found.append(search.stream())
        else:
            refused.append(Refused(recording.calls[min(sums)].name, fault))
    return found, refused


def _connected_sums(recording: Recording) -> list[set[int]]:
    """Returns sets of calls of `add` that read each other's results or a common input."""
    groups: list[tuple[set[int], set[int]]] = []
    for call in recording.calls:
        if call.op != "add" or len(call.inputs) != 2:
            continue
        tensors = {call.position, *(s.producer for s in call.inputs if s.producer is not None)}
        sums = {call.position}
        for group in [group for group in groups if group[1] & tensors]:
            sums |= group[0]
            tensors |= group[1]
            groups.remove(group)
        groups.append((sums, tensors))
    return [sums for sums, _ in groups]


class _Search:
    """One stream: the sums, who writes and who reads them."""

    def __init__(self, model: nn.Module, recording: Recording, sums: set[int]) -> None:
        self.model, self.recording, self.sums = model, recording, sums
        self.modules = dict(model.named_modules())
        calls = [recording.calls[position] for position in sorted(sums)]
        self.size = calls[0].output_shapes[0][-1] if calls[0].output_shapes[0] else 0
        sources = [(call, source) for call in calls for source in call.inputs]
        self.sources = sources
        self.members = sums | {s.producer for _, s in sources if s.producer is not None}
        readers = [c for position in sorted(self.members) for c in recording.consumers_of(recording.calls[position])]
        self.readers = list(dict.fromkeys(c for c in readers if c.position not in sums))
        self.norms = [c for c in self.readers if c.kind == "module" and is_norm(self.modules[c.name])]
        self.parameter_readers = {
            name: call.name
            for call in recording.calls
            if call.position not in sums
            for source in call.inputs
            for name in source.parameters
        }

    def stream(self) -> Stream:
        norms = tuple((norm.name, tuple(c.name for c in self.recording.consumers_of(norm))) for norm in self.norms)
        return Stream(self.size, tuple(self._writers()), norms, any(self._subtracts_mean(n.name) for n in self.norms))

    def _writers(self) -> Iterable[str]:
        names = [self.recording.calls[p].name for p in sorted(self.members - self.sums)]
        return dict.fromkeys([*names, *(name for _, s in self.sources for name in s.parameters[:1])])

    def fault(self) -> str | None:
        """Returns why the stream cannot be rotated; None where it can."""
        checks = (self._sum_fault, self._writer_fault, self._reader_fault, self._norm_fault, self._parameter_fault)
        return next((fault for check in checks if (fault := check())), None)

    def _sum_fault(self) -> str | None:
        for call, source in self.sources:
            if source.parameters:
                if not source.shape or source.shape[-1] != self.size:
                    return f"{source.parameters[0]!r} {list(source.shape)} is added for all channels alike"
            elif source.producer is None:
                return f"{call.name!r} adds a tensor that no layer made"
            elif not source.direct or source.output:
                made = self.recording.calls[source.producer].name
                return f"{call.name!r} adds the output of {made!r} through a view, cast or reshaped copy"
            elif source.shape != call.output_shapes[0] and source.shape[-1:] != (self.size,):
                return f"{call.name!r} spreads a tensor of another size over all channels"
        return None

    def _writer_fault(self) -> str | None:
        for position in sorted(self.members - self.sums):
            call = self.recording.calls[position]
            module = self.modules.get(call.name) if call.kind == "module" else None
            if module is not None and is_norm(module):
                return f"the norm {call.name!r} writes it, as in post-norm transformers"
            if not is_linear(module) and not isinstance(module, nn.Embedding):
                return f"{call.name!r} ({call.op}) writes it, which is no linear layer or embedding"
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                return f"{call.name!r} renormalizes its rows (max_norm)"
        return None

    def _reader_fault(self) -> str | None:
        for reader in self.readers:
            if reader.kind == "output":
                return "it is what the model returns"
            if reader not in self.norms:
                return f"{reader.name!r} ({reader.op}) reads it, which is no norm"
            if not all(source.direct and not source.output for source in reader.inputs):
                return f"{reader.name!r} reads it through a view, cast or reshaped copy"
        return None

    def _norm_fault(self) -> str | None:
        for norm in self.norms:
            module = self.modules[norm.name]
            if fault := _norm_behaviour_fault(module, self.size):
                return f"{norm.name!r}: {fault}"
            readers = self.recording.consumers_of(norm)
            if not readers:
                return f"nothing reads {norm.name!r}"
            for reader in readers:
                if reader.kind == "output":
                    return f"the output of {norm.name!r} is what the model returns"
                layer = self.modules.get(reader.name) if reader.kind == "module" else None
                if not is_linear(layer):
                    return f"{reader.name!r} ({reader.op}) reads {norm.name!r}, which is no linear layer"
                if not all(source.direct and not source.output for source in reader.inputs):
                    return f"{reader.name!r} reads {norm.name!r} through a view, cast or reshaped copy"
                bias = getattr(module, "bias", None)
                if bias is not None and bool(bias.any()) and getattr(layer, "bias", None) is None:
                    return f"{reader.name!r} has no bias, which the bias of {norm.name!r} could go into"
        return None

    def _parameter_fault(self) -> str | None:
        stream = self.stream()
        layers = [*stream.writers, *(name for norm, readers in stream.norms for name in (norm, *readers))]
        for name in dict.fromkeys(layers):
            if fault := parameters_fault(self.model, self.recording, name, self.parameter_readers):
                return fault
        return None

    def _subtracts_mean(self, name: str) -> bool:
        return subtracts_mean(self.modules[name], self.size)


def parameters_fault(
    model: nn.Module, recording: Recording, name: str, parameter_readers: Mapping[str, str]
) -> str | None:
    """Returns why the parameters of a module, or a parameter, cannot be changed for this place alone.

    Args:
        model: that was recorded.
        recording: of one float pass.
        name: of a module or of a parameter.
        parameter_readers: calls that read a parameter outside of its module, by the parameter's name.
    """
    module = dict(model.named_modules()).get(name)
    if module is None:
        return sharing_fault(model, [name], parameter_readers)
    fault = parameter_fault(model, recording, name, ("weight", "bias"), parameter_readers)
    return None if fault is None else f"{name!r}: {fault}"


def subtracts_mean(norm: nn.Module, size: int) -> bool:
    """Returns whether a norm makes the mean of its input 0, as layer norm does."""
    y = _neutral(norm)(_samples(size) + 3.0)
    return bool(y.mean(1).abs().max() < _ROUNDING * y.abs().max())


def _norm_behaviour_fault(norm: nn.Module, size: int) -> str | None:
    """Returns why rotations do not go through a norm, tried out in float64."""
    names = {key: tensor for key, tensor in norm.named_parameters(recurse=False) if tensor is not None}
    if any(tensor.numel() != size for tensor in names.values()):
        return f"its weight has {[tensor.numel() for tensor in names.values()]} numbers, the stream has {size} channels"
    try:
        neutral, plain, x = _neutral(norm), _double(norm), _samples(size)
        q = random_rotation(size, torch.Generator().manual_seed(0), "orthogonal", keep_mean=subtracts_mean(norm, size))
        with torch.no_grad():
            turned = torch.allclose(neutral(x @ q), neutral(x) @ q, rtol=_ROUNDING, atol=_ROUNDING)
            expected = neutral(x)
            for key, parameter in names.items():
                value = parameter.detach().double().cpu()
                expected = expected * value if key == "weight" else expected + value
            factor = torch.allclose(plain(x), expected, rtol=_ROUNDING, atol=_ROUNDING * float(expected.abs().max()))
    except Exception as error:  # the reason goes to the caller, with whatever a foreign forward raised
        return f"it could not be tried out: its forward raised {error!r}"
    if not turned:
        return "it computes something else on rotated channels"
    return None if factor else "its weight is no plain factor of its output"


def _samples(size: int) -> Tensor:
    return torch.randn(4, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _double(norm: nn.Module) -> nn.Module:
    result = copy.deepcopy(norm).cpu().double().eval()
    result.__class__ = float_class(norm)
    return result


def _neutral(norm: nn.Module) -> nn.Module:
    """Returns a copy without what its parameters do."""
    result = _double(norm)
    with torch.no_grad():
        for key, tensor in result.named_parameters(recurse=False):
            tensor.fill_(1.0 if key == "weight" else 0.0)
    return result
