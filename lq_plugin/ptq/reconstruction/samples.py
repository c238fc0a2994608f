"""Inputs and targets of one unit, drawn in small batches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lq_plugin.ptq.layerwise.activation_cache import ActivationCache, tree_bytes

#: Inputs from the quantized and from the float model (or None), and the float model's outputs.
Record = tuple[Any, Any, list[Tensor]]


class Samples:
    """Records of one unit, in a cache; `draw` takes some samples of one of them.

    A sample is an index of dim 0. Whether the unit treats samples apart is tried out: a sequence-first transformer
    does not, and is given whole batches then. Records of equal structure become a single one where memory allows.

    Args:
        cache: holds the records.
        forward: the float unit, from its inputs to the list of its outputs.
    """

    def __init__(self, cache: ActivationCache, forward: Callable[[Any], list[Tensor]]) -> None:
        self.cache, self.forward = cache, forward
        self.sizes: list[int] = []
        self.separable: bool | None = None
        self.bytes = 0
        self._merged: Record | None = None

    def add(self, record: Record) -> None:
        """Appends a record."""
        targets = record[2]
        if self.separable is None:
            self.separable = self._is_separable(record)
        self.cache.put(("sample", len(self.sizes)), record)
        self.sizes.append(targets[0].shape[0] if targets[0].dim() else 1)
        self.bytes += tree_bytes(record)

    def _is_separable(self, record: Record) -> bool:
        inputs, _, targets = record
        if any(t.dim() == 0 or t.shape[0] != targets[0].shape[0] or not t.isfinite().all() for t in targets):
            return False
        count = targets[0].shape[0]
        chosen = torch.tensor(sorted({0, count // 2}))
        leaves = record[1] if record[1] is not None else inputs
        # Outputs of the inputs' own float pass: the targets belong to the float inputs.
        expected = targets if record[1] is not None else self.forward(tree_map(copied, inputs))
        got = self.forward(_take(leaves, chosen, count))
        return all(
            g.shape[0] == len(chosen)
            and torch.allclose(g.float(), e[chosen.to(e.device)].float(), rtol=1e-3, atol=1e-4 * float(e.abs().max()))
            for g, e in zip(got, expected, strict=True)
        )

    def merge(self) -> None:
        """Makes one record of all, where they fit together and the cache's budget holds both; a record at a time."""
        room = self.cache.budget - self.cache.in_memory
        if len(self.sizes) < 2 or not self.separable or self.bytes > min(room, self.cache.budget // 2):
            return
        first, structure = tree_flatten(self.cache.get(("sample", 0)))
        joined, same = [True] * len(first), [True] * len(first)
        for index, size in enumerate(self.sizes):
            leaves, spec = tree_flatten(self.cache.get(("sample", index)))
            if spec != structure:
                return
            for i, (leaf, other) in enumerate(zip(leaves, first, strict=True)):
                joined[i] &= _is_batch(leaf, size) and leaf.shape[1:] == other.shape[1:]
                same[i] &= _is_same(leaf, other)
        if not all(a or b for a, b in zip(joined, same, strict=True)):
            return
        count = sum(self.sizes)
        merged = [
            leaf.new_empty((count, *leaf.shape[1:])) if along else leaf
            for leaf, along in zip(first, joined, strict=True)
        ]
        start = 0
        for index, size in enumerate(self.sizes):
            for leaf, whole, along in zip(tree_leaves(self.cache.get(("sample", index))), merged, joined, strict=True):
                if along:
                    whole[start : start + size] = leaf
            start += size
        self.clear()
        self._merged = tree_unflatten(merged, structure)
        self.cache.reserve(tree_bytes(self._merged))
        self.sizes = [count]

    def clear(self) -> None:
        """Drops the records from the cache."""
        self.cache.drop_where(lambda key: key[0] == "sample")
        self.cache.reserve(-tree_bytes(self._merged))
        self._merged = None

    def draw(self, size: int, generator: torch.Generator) -> Record:
        """Returns `size` samples of one record, chosen with a probability that follows its number of samples.

        A record with fewer samples, or one that cannot be split, comes back as a whole.
        """
        index = int(torch.multinomial(torch.tensor(self.sizes, dtype=torch.float64), 1, generator=generator))
        record = self._merged if self._merged is not None else self.cache.get(("sample", index))
        count = self.sizes[index]
        if not self.separable or size >= count:
            found: Record = tree_map(copied if self._merged is not None else renewed, record)
            return found
        chosen = torch.randperm(count, generator=generator)[:size]
        found = _take(record, chosen, count)
        return found

    def records(self) -> list[Record]:
        """All records, one after the other."""
        return (
            [self._merged]
            if self._merged is not None
            else [self.cache.get(("sample", i)) for i in range(len(self.sizes))]
        )


def _take(tree: Any, chosen: Tensor, count: int) -> Any:
    def take(leaf: Tensor) -> Tensor:
        return leaf.index_select(0, chosen.to(leaf.device)) if leaf.dim() and leaf.shape[0] == count else leaf

    return tree_map(lambda leaf: take(leaf) if isinstance(leaf, Tensor) else renewed(leaf, take), tree)


def _is_batch(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _is_same(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, Tensor):
        return isinstance(other, Tensor) and leaf.shape == other.shape and torch.equal(leaf, other)
    return type(leaf) is type(other) and bool(leaf == other)


def copied(leaf: Any) -> Any:
    """A copy of a tensor, or of an object that a model may write into."""
    return leaf.clone() if isinstance(leaf, Tensor) else renewed(leaf)


def renewed(leaf: Any, of: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Returns a copy of an object that a model may write into, such as a cache of keys and values.

    `of` makes the tensors in the copy. A tensor itself stays as it is; so do modules, and what cannot be copied (a
    lock, a generator).
    """
    if isinstance(leaf, (Tensor, nn.Module)):
        return leaf
    held = {id(tensor): tensor for tensor in _held_tensors(leaf, set())}
    try:
        return copy.deepcopy(leaf, {key: of(tensor) for key, tensor in held.items()})
    except (TypeError, pickle.PicklingError):
        return leaf


def _held_tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        for item in (*inner, *getattr(value, "__dict__", {}).values()):
            yield from _held_tensors(item, seen)


def mixed(quantized: Any, floats: Any, share: float, generator: torch.Generator) -> Any:
    """Returns quantized values with some elements replaced by the float ones, at random (QDrop).

    Args:
        quantized, floats: nested values of the same structure and shapes.
        share: probability that an element is the float one.
        generator: of the choice.
    """

    def mix(q: Any, f: Any) -> Any:
        if not isinstance(q, Tensor) or not q.is_floating_point():
            return q
        return torch.where(torch.rand(q.shape, generator=generator).to(q.device) < share, f, q)

    return tree_map(mix, quantized, floats)


def float_leaves(tree: Any) -> list[Tensor]:
    """The floating-point tensors in a nested value."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
