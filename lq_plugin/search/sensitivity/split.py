"""Splits a batch along its first dim."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def split(batch: Any, size: int) -> list[Any]:
    """Returns parts of at most `size` samples, or the batch alone where the first dims of its tensors differ.

    >>> import torch
    >>> [part["y"].tolist() for part in split({"x": torch.zeros(5, 2), "y": torch.arange(5)}, 2)]
    [[0, 1], [2, 3], [4]]
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    counts = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    count = counts.pop() if len(counts) == 1 else None
    if count is None or count <= size:
        return [batch]
    return [
        tree_map(lambda leaf, i=i: leaf[i : i + size] if isinstance(leaf, Tensor) else leaf, batch)
        for i in range(0, count, size)
    ]
