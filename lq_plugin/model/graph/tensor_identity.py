"""Tensors in nested values, and what tells one tensor from another while both are alive."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested lists, tuples, sets, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def leading_size(value: Any, dim: int = 0) -> int | None:
    """Returns the size along `dim` of the first tensor in a value, the samples of a batch; None without one."""
    return next((tensor.shape[dim] for tensor in tensors_of(value) if tensor.dim() > dim), None)


def storage_of(tensor: Tensor) -> tuple[Any, Any]:
    """Returns a key for the memory of a tensor, and the object that keeps that key from being reused."""
    try:
        storage = tensor.untyped_storage()
        return storage._cdata, storage
    except (
        NotImplementedError,
        RuntimeError,
        ValueError,
    ):  # sparse tensors, those inside vmap and lazy ones have no storage
        return ("id", id(tensor)), tensor


def identity_of(tensor: Tensor) -> tuple[Any, Any]:
    """Returns the key of `storage_of`, and an object that keeps it from being reused, but not the memory's content."""
    key, holder = storage_of(tensor)
    return key, holder if holder is tensor else StorageWeakRef(holder)


def geometry_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Returns how a tensor reads its memory: offset, shape and strides; None where it has none."""
    try:
        return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype
    except (NotImplementedError, RuntimeError):
        return None


def version_of(tensor: Tensor) -> int | None:
    """Returns the count of writes in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


#: What copies a tensor for `copy.deepcopy`. Of parameters torch tells no function mode.
_DEEPCOPY = {kind.__deepcopy__.__code__ for kind in (Tensor, nn.Parameter)}


def within_deepcopy() -> bool:
    """Returns whether the code that runs now is a part of `copy.deepcopy` of a tensor."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code not in _DEEPCOPY:
        frame = frame.f_back
    return frame is not None
