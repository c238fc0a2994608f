"""Rows of an input that each expert of a stack multiplies, found as a product of the stack is about to run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: What of a stack a tensor holds: all experts, one, or several in an order; `"part"` where it is not known.
Experts = int | Tensor | str | None
#: Functions that may take experts out of a stack.
_SELECT = ("getitem", "select", "index_select", "narrow", "split", "chunk", "tensor_split", "unsafe_chunk")


def selected(experts: Experts, name: str, arguments: tuple[Any, ...]) -> Experts:
    """Returns the experts that a view or selection of a stack holds.

    Args:
        experts: of the tensor before.
        name: of the function.
        arguments: of the function, the tensor first.
    """
    if experts is not None or name not in _SELECT:
        return experts
    if name not in ("getitem", "select", "index_select") or len(arguments) < (2 if name == "getitem" else 3):
        return "part" if _along_experts(name, arguments) else experts
    index = arguments[1] if name == "getitem" else arguments[2]
    if name != "getitem" and arguments[1] != 0:
        return experts
    if isinstance(index, tuple) and index and all(isinstance(rest, slice) for rest in index[1:]):
        index = index[0]
    if isinstance(index, int):
        return index
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.dim() < 2:
        return int(index) if index.dim() == 0 else index
    return "part"


def _along_experts(name: str, arguments: tuple[Any, ...]) -> bool:
    """Returns whether experts may be taken apart: unless another dim is given by place."""
    place = 1 if name == "narrow" else 2
    dim = arguments[place] if len(arguments) > place else 0
    return not (isinstance(dim, int) and dim % 3)


def rows_of_experts(
    x: Tensor, experts: Experts, count: int, offs: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yields each expert with the rows `[rows, in]` that it multiplies.

    Args:
        x: `[..., in]`; where each matrix of the product has rows of its own, `[matrices, rows, in]`.
        experts: of the product's matrices, in their order.
        count: matrices of the whole stack.
        offs: ends of each expert's rows in `[rows, in]`.

    Raises:
        ValueError: it cannot be told which expert multiplies what.

    >>> x = torch.arange(4.0).view(4, 1)
    >>> [(e, rows.flatten().tolist()) for e, rows in rows_of_experts(x, None, 2, torch.tensor([1, 4]))]
    [(0, [0.0]), (1, [1.0, 2.0, 3.0])]
    """
    if isinstance(experts, str):
        raise ValueError("its code selects experts in a way that is not followed")
    if isinstance(experts, int):
        yield experts % count, x.reshape(-1, x.shape[-1])
    elif offs is not None:
        start = 0
        for expert, end in enumerate(offs.tolist()):
            yield expert, x[start:end]
            start = end
    else:
        ids = torch.arange(count, device=x.device) if experts is None else experts
        rows = x if x.dim() > 2 else x.unsqueeze(0)
        rows = rows.reshape(-1, *rows.shape[-3:])  # batches before the matrices, if there are any
        if rows.shape[1] not in (1, len(ids)):
            raise ValueError(f"its product has {rows.shape[1]} inputs for {len(ids)} matrices")
        for expert in ids.unique().tolist():
            mine = rows if rows.shape[1] == 1 else rows[:, ids == expert]
            repeats = 1 if rows.shape[1] > 1 else int((ids == expert).sum())
            yield expert, mine.reshape(-1, x.shape[-1]).repeat(repeats, 1)
