"""Programs take a fixed number of samples; these cut what is given into such pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lq_plugin.errors import ExportError


def example(inputs: Sequence[Any], batch: int) -> tuple[Any, ...]:
    """Returns the first samples of an example.

    Args:
        inputs: positional arguments, their tensors `[N, ...]`.
        batch: samples; 0: the example as it is.

    Raises:
        ExportError: the example is smaller.
    """
    if not batch:
        return tuple(inputs)
    for x in tree_leaves(inputs):
        if isinstance(x, Tensor) and (x.ndim == 0 or len(x) < batch):
            raise ExportError(
                f"batch={batch}, and an example input has the shape {list(x.shape)}: give more samples, or batch=0 for "
                "a file that takes tensors of these shapes"
            )
    return tuple(tree_map(lambda x: x[:batch].clone() if isinstance(x, Tensor) else x, tuple(inputs)))


def pieces(args: Sequence[Any], size: int | None, drop: bool = False) -> Iterator[Sequence[Any]]:
    """Yields arguments in pieces of so many samples.

    Args:
        args: nested, their tensors `[N, ...]`.
        size: samples of a piece; None: the arguments are yielded as they are.
        drop: leave out samples at the end that make no piece.

    Raises:
        ExportError: N is no multiple of the size.
    """
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    counts = {len(x) for x in tensors if x.ndim}
    if size is None or counts == {size}:
        yield args
        return
    count = counts.pop() if len(counts) == 1 else 0
    if not count or (count % size and not drop):
        shapes = [list(x.shape) for x in tensors]
        raise ExportError(f"a file that takes {size} samples at a time cannot take tensors of shapes {shapes}")
    for start in range(0, count - count % size, size):
        piece = slice(start, start + size)
        yield tree_map(lambda x, piece=piece: x[piece] if isinstance(x, Tensor) else x, args)


def in_pieces(run: Callable[..., list[Tensor]], size: int | None) -> Callable[..., list[Tensor]]:
    """Returns a function for any multiple of the samples that `run` takes at a time."""

    def whole(*args: Any) -> list[Tensor]:
        results = [run(*piece) for piece in pieces(args, size)]
        return results[0] if len(results) == 1 else [torch.cat(parts) for parts in zip(*results, strict=True)]

    return whole
