"""Data loaders in what a hook of Lightning returns: one, or several in lists, tuples and dicts."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader


def loaders_in(value: Any) -> list[Any]:
    """Returns the loaders of `value`, in Lightning's order.

    Anything else than `DataLoader`s, such as a list of batches, is one loader.

    >>> a, b = DataLoader(range(2)), DataLoader(range(3))
    >>> [len(loader) for loader in loaders_in([a, {"second": b}])], loaders_in([[1, 2], [3, 4]])
    ([2, 3], [[[1, 2], [3, 4]]])
    """
    # A CombinedLoader of Lightning keeps what it was made of.
    leaves = tree_leaves(getattr(value, "iterables", value))
    return leaves if leaves and all(isinstance(leaf, DataLoader) for leaf in leaves) else [value]
