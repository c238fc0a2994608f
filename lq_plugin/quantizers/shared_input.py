"""Inputs that several layers read, quantized once: of queries, keys and values, of a gate and its partner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")


class _Entry(NamedTuple):
    x: Tensor
    version: int
    key: tuple[Any, ...]
    value: Any


class SharedInput:
    """Tensor that one layer of a module quantized last, for other layers that may read it.

    It is held while the module's forward runs, between the hooks `enter` and `leave`, and in neither of these cases:
    torch.compile traces; something watches or rewrites operations; the tensor's changes cannot be told (inference
    mode); gradient checkpointing began inside of the module, so that its second run is not between the hooks (before
    torch 2.8, which cannot tell, nothing is shared).
    """

    def __init__(self) -> None:
        self._depth = 0
        self._packing: Any = None
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        # Copies begin empty.
        return SharedInput, ()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Begins a call of the module."""
        if not torch.compiler.is_compiling():
            self._depth += 1
            self._packing = _packing()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends a call of the module, also after an exception.

        Args:
            module, args, output: as torch gives them to a forward hook.
        """
        if not torch.compiler.is_compiling():
            self._depth = max(self._depth - 1, 0)
            self._entry = None

    def takes(self, x: Tensor) -> bool:
        """Returns True where this call may share."""
        if (
            not self._depth
            or _top_hooks is None
            or torch.compiler.is_compiling()
            or type(x) is not Tensor
            or x.device.type != "cpu"
            or x.is_inference()
        ):
            return False
        return (
            not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())
            and _packing() is self._packing
        )

    def once(self, x: Tensor, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Returns what `make` gave for the same tensor and key before, or gives now.

        Args:
            x: that `takes` holds for.
            key: everything else that the result depends on.
            make: the result.
        """
        key = (*key, torch.is_grad_enabled())
        entry = self._entry  # read once: replicas of a module run in threads
        if entry is None or entry.x is not x or entry.version != x._version or entry.key != key:
            self._entry = entry = _Entry(x, x._version, key, make())
        return cast(T, entry.value)


#: The hooks in force that pack what autograd saves and unpack it again.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _packing() -> Any:
    """Returns the function that packs what autograd saves now, or None."""
    hooks = None if _top_hooks is None else _top_hooks(False)
    return None if hooks is None else hooks[0]
