"""Tensors that are on disk, and which nothing is expected to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lq_plugin.model.graph.recording import Recording

#: What reads the values of a tensor without an operation.
_READS = {
    Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__array__,
    Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__dlpack__,
}  # fmt: skip


class Unread(Tensor):
    """Stands for a tensor: its shape and dtype are there, an operation that reads its values fetches them.

    Args:
        like: has its shape, strides and dtype.
        device: of the tensor.
        fetch: returns it.
    """

    fetch: Callable[[], Tensor]
    _fetched: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> Unread:
        y: Unread = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        y.fetch, y._fetched = fetch, None
        return y

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            args, kwargs = values_of((args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = values_of((args, kwargs or {}))
        return func(*args, **kwargs)

    def value(self) -> Tensor:
        """Returns the tensor, the same one each time: what writes into it is seen."""
        if self._fetched is None:
            self._fetched = self.fetch()
        return self._fetched

    def again(self) -> Unread:
        """Returns one that has not been fetched, nor written into."""
        return Unread(self, self.device, self.fetch)


def values_of(tree: Any) -> Any:
    """Returns nested tensors with all of them fetched."""
    return tree_map(lambda leaf: leaf.value() if isinstance(leaf, Unread) else leaf, tree)


def unread_modules(recording: Recording, modules: set[str]) -> set[str]:
    """Returns those of some modules whose results nothing reads but code inside of these modules.

    Args:
        recording: of a pass.
        modules: names, none inside of another.
    """
    owner = [next((outer for outer in outer_names(call.name) if outer in modules), None) for call in recording.calls]
    read = {
        owner[source.producer]
        for call in recording.calls
        if owner[call.position] is None
        for source in call.inputs
        if source.producer is not None
    }
    return {module for module in modules if module not in read}


def outer_names(name: str) -> list[str]:
    """Returns the names of the modules that a module is in, and its own.

    >>> outer_names("a.b.c")
    ['a', 'a.b', 'a.b.c']
    """
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]
