"""Parameters that a pass may change: of a module that runs once, and read by nothing else.

A recording of one float pass shows both.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.model.graph.record import Recording


@dataclass(frozen=True)
class Refused:
    """A layer, or what begins with it, that a pass leaves as it is, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name!r}: {self.reason}"

    def __getattr__(self, attribute: str) -> str:
        if attribute not in ("layer", "producer", "batch_norm"):  # of the classes that this one was in version 0.1
            raise AttributeError(f"Refused has no attribute {attribute!r}")
        warnings.warn(f"Refused.{attribute} is Refused.name now", DeprecationWarning, stacklevel=2)
        return self.name


def write_all(changes: Iterable[tuple[str, Tensor, Tensor]], verb: str) -> None:
    """Writes new values into tensors, all or none.

    Args:
        changes: name, tensor, and its new value in any dtype.
        verb: what is done to them, for the message: `"equalize"`.

    Raises:
        QuantizationError: values that overflow the dtype of their tensor. Nothing is changed then.
    """
    with torch.no_grad():
        cast = [(name, tensor, value.to(tensor.dtype)) for name, tensor, value in changes]
        faults = [
            f"{name!r}: the new values are not finite in {tensor.dtype}"
            for name, tensor, value in cast
            if not value.isfinite().all()
        ]
        raise_all(QuantizationError, f"cannot {verb}", faults)
        for _, tensor, value in cast:
            tensor.copy_(value)


def parameter_fault(
    model: nn.Module, recording: Recording, name: str, keys: Iterable[str], readers: Mapping[str, str] | None = None
) -> str | None:
    """Returns why parameters of a module cannot be changed for this place alone; None when they can.

    Args:
        model: that was recorded.
        recording: of one float pass.
        name: of the module.
        keys: of the parameters; those that are None are passed over.
        readers: calls that read a parameter outside of its module, by the parameter's name; None: all of the recording.
    """
    if (fault := call_fault(recording, name)) is not None:
        return fault
    module = model.get_submodule(name)
    names = []
    for key in keys:
        parameter = module._parameters.get(key)
        if key in module.__dict__ or (parameter is None and getattr(module, key, None) is not None):
            return f"its {key} is computed, not a plain parameter"
        if parameter is None:
            continue
        if not (parameter.is_floating_point() and bool(parameter.isfinite().all())):
            return f"its {key} is not floating point, or holds NaN or Inf"
        names.append(f"{name}.{key}" if name else key)
    return sharing_fault(model, names, recording.parameter_readers if readers is None else readers)


def call_fault(recording: Recording, name: str) -> str | None:
    """Returns why a module has not one call in the recorded pass; None when it has."""
    times = len(recording.calls_of(name))
    if times == 1:
        return None
    return f"it was called {times} times in the recorded pass" if times else "it was not called in the recorded pass"


def sharing_fault(model: nn.Module, names: list[str], readers: Mapping[str, str]) -> str | None:
    """Returns why parameters cannot be changed for their own modules alone; None when they can.

    Args:
        model: that has them.
        names: of parameters and buffers that are changed together.
        readers: calls that read a parameter outside of its module, by the parameter's name.
    """
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {name: tensor for name, tensor in everything if name in names}
    for name, tensor in own.items():
        if name in readers:
            return f"{name!r} is also read by {readers[name]!r}"
        others = [other for other, candidate in everything if other not in own and _overlap(tensor, candidate)]
        # A module reachable under two names is one module: the recording counted its calls.
        others = [other for other in others if _owner(model, other) is not _owner(model, name)]
        if others:
            return f"{name!r} is shared with {', '.join(map(repr, others))}"
    return None


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def _extent(t: Tensor) -> tuple[int, int]:
    """Returns the first byte of its storage that a tensor spans, and the first after it."""
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(t.shape, t.stride(), strict=True))
    start = int(t.storage_offset()) * t.element_size()
    return start, start + (last + 1) * t.element_size() if t.numel() else start
