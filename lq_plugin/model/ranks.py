"""Agreements of the processes of a distributed run; in a single process nothing happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lq_plugin.errors import CalibrationError


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Returns whether this is the process that writes files for all."""
    return world_size() == 1 or dist.get_rank() == 0


def average(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over all processes, in one all-reduce; NaN in one process becomes NaN in all."""
    if world_size() == 1 or not tensors:
        return
    bucket = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(bucket)
    bucket /= world_size()
    for tensor, mean in zip(tensors, bucket.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))


def averaged(values: Sequence[float]) -> list[float]:
    """The mean of each number over all processes."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    average([tensor])
    return tensor.tolist()


def gathered(value: Any) -> list[Any]:
    """The value that each process has, in the order of ranks; plain data only."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def require_batches(count: int) -> None:
    """Refuses to go on where a process has read no batch.

    Args:
        count: batches that this process has read.

    Raises:
        CalibrationError: in every process, naming the one without.
    """
    counts = gathered(count)
    if not all(counts):
        where = "" if len(counts) == 1 else f" in the process of rank {counts.index(0)}"
        raise CalibrationError(f"no calibration data: the loader gave 0 batches{where}")
