"""Memory for results that are read once, at once."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

#: Bytes that a thread keeps; of larger results each gets memory of its own.
_LARGEST = 2**26


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")


_OF_THREAD = _OfThread()


def workspace_like(x: Tensor) -> Tensor:
    """Returns memory of the shape, strides and dtype of a dense tensor; the next call in this thread gives it again.

    It is warm, and no page of it is new: an allocator hands memory back to the system, which clears each page of what
    takes its place.
    """
    if x.device.type != "cpu" or x.nbytes > _LARGEST:
        return torch.empty_like(x)
    if _OF_THREAD.memory.numel() < x.nbytes:
        _OF_THREAD.memory = torch.empty(x.nbytes, dtype=torch.uint8, device="cpu")
    return _OF_THREAD.memory[: x.nbytes].view(x.dtype).as_strided(x.shape, x.stride())
