"""Activations kept in memory up to a budget, and on disk beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lq_plugin.errors import CalibrationError
from lq_plugin.utilities.files import named_faults, temporary_folder

DEFAULT_CACHE_BYTES = 2 * 2**30


class ActivationCache:
    """Nested tensors by key, copied to the CPU when put, and to the device they came from when read.

    Copies both ways, because models write into their inputs (`ReLU(inplace=True)`).

    Args:
        budget: bytes of tensors held in memory; what comes later goes to files in a temporary folder.
        folder: where to make that folder; None: the system's.

    >>> with ActivationCache(budget=4096) as cache:
    ...     cache.put("a", torch.zeros(512))
    ...     cache.put("b", (torch.ones(1024), "label"))
    ...     cache.in_memory, cache.on_disk, cache.get("b")[1]
    (2048, 4096, 'label')
    """

    def __init__(self, budget: int = DEFAULT_CACHE_BYTES, folder: str | Path | None = None) -> None:
        self.budget = budget
        self.in_memory = self.on_disk = 0
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: dict[Hashable, tuple[Any, int]] = {}
        self._files: dict[Hashable, tuple[Path, int, list[Any], Any]] = {}
        self._count = 0

    def reserve(self, size: int) -> None:
        """Counts bytes that are held elsewhere into the budget; a negative number frees them again."""
        self.in_memory += size

    def put(self, key: Hashable, value: Any, on_disk: bool = False) -> None:
        """Keeps a copy of `value`, instead of the key's former one.

        Args:
            key: to get it by.
            value: nested tensors.
            on_disk: not in memory, whatever the budget has left.
        """
        self.drop(key)
        size = tree_bytes(value)
        if not on_disk and self.in_memory + size <= self.budget:
            self._held[key] = (_map(value, lambda t: (t.device, t.detach().to("cpu", copy=True))), size)
            self.in_memory += size
            return
        if self._folder is None:
            self._folder = temporary_folder("activations", self._parent)
        path = Path(self._folder.name) / f"{self._count}.pt"
        self._count += 1
        leaves, structure = tree_flatten(value)
        # Tensors alone go to the file, so that reading it executes nothing.
        with named_faults(path, CalibrationError), open(path, "wb") as stream:
            torch.save([_alone(leaf.detach().cpu()) for leaf in leaves if isinstance(leaf, Tensor)], stream)
        rest = [leaf.device if isinstance(leaf, Tensor) else _Plain((leaf,)) for leaf in leaves]
        self._files[key] = (path, size, rest, structure)
        self.on_disk += size

    def get(self, key: Hashable) -> Any:
        """Returns a copy of what was put.

        Raises:
            KeyError: nothing was.
        """
        if key in self._held:
            return _restore(self._held[key][0], copy=True)
        path, _, rest, structure = self._files[key]
        tensors = iter(torch.load(path, weights_only=True))
        return tree_unflatten(
            [leaf[0] if isinstance(leaf, _Plain) else next(tensors).to(leaf) for leaf in rest], structure
        )

    def drop(self, key: Hashable) -> None:
        """Forgets a key; no error when it is not there."""
        if key in self._held:
            self.in_memory -= self._held.pop(key)[1]
        if key in self._files:
            path, size, *_ = self._files.pop(key)
            path.unlink()
            self.on_disk -= size

    def drop_where(self, wanted: Callable[[Any], bool]) -> None:
        """Forgets the keys for which `wanted(key)` holds."""
        for key in [key for key in self if wanted(key)]:
            self.drop(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._files

    def __iter__(self) -> Any:
        yield from list(self._held)
        yield from list(self._files)

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        self._files.clear()
        self.in_memory = self.on_disk = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class _Plain(tuple[Any, ...]):
    """A leaf that is no tensor."""


class _Kept(tuple[Any, ...]):
    """A tensor and the device it came from; a type of its own, so that it is a leaf."""


def _alone(tensor: Tensor) -> Tensor:
    """Returns a tensor without the rest of the memory that it is a view of, all of which would be written."""
    view = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if view else tensor


def _map(value: Any, keep: Callable[[Tensor], tuple[Any, Tensor]]) -> Any:
    return tree_map(lambda leaf: _Kept(keep(leaf)) if isinstance(leaf, Tensor) else leaf, value)


def _restore(value: Any, copy: bool) -> Any:
    def back(leaf: Any) -> Any:
        return leaf[1].to(leaf[0], copy=copy) if isinstance(leaf, _Kept) else leaf

    return tree_map(back, value, is_leaf=lambda leaf: isinstance(leaf, _Kept))


def tree_bytes(value: Any) -> int:
    """Bytes of the tensors in a nested value."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
