"""Extremes of a table that optimizers write to row by row: after a step the rows of its gradient are looked at alone.

Of a sparse gradient some optimizers of torch write to no row but those it names. A dense one is not followed, though
it is known which rows were read: `all_reduce` and writes through `.grad.data` change its other rows unseen. What else
writes to the table counts its version up by one more, and the whole table is looked at again. Writes through `.data`
go unseen until `train()` or `eval()` is called, but for those that change one of the rows that are read next.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook

from lq_plugin.functional.affine import extremes, qparams_of
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native.lookup import lookup_kernels

#: Rows, of those that are read, that are compared with what is known of them.
COMPARED = 64


class RowExtremes:
    """The smallest and the largest value of each row of a table, and of all.

    Copies and pickles of it are None: the table of a copy is another one.

    Args:
        table: `[rows, columns]`, a leaf.
        sparse: its gradients are; those of others are followed once a step has shown that they can be.
        grid: the integer levels that cover the extremes.
    """

    low: Tensor
    high: Tensor
    bounds: Tensor

    def __init__(self, table: Tensor, sparse: bool, grid: IntegerGrid) -> None:
        self._table = weakref.ref(table)
        self._state: tuple[int, int] | None = None
        self._followed, self._grid = sparse, grid
        self._qparams: tuple[Tensor, Tensor] | None = None
        _FOLLOWED.add(self)
        _watch_steps()

    def __reduce__(self) -> Any:
        return type(None), ()

    def is_of(self, table: Tensor) -> bool:
        """Returns True if it follows this very tensor."""
        return self._table() is table

    def qparams(self, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point of the extremes of the table now, float32 `[1]`.

        Args:
            table: that it follows.
            index: of the rows that are read.
        """
        if self._state is None or self._state != _state(table) or not self._knows(table, index):
            if not self._followed:
                return qparams_of(table, self._grid)
            with torch.no_grad():
                self.low, self.high = _extremes(table)
                self.bounds = torch.stack((self.low.amin(), self.high.amax()))
            self._state, self._qparams = _state(table), None
        if self._qparams is None:
            self._qparams = qparams_of(self.bounds, self._grid)
        return self._qparams

    def _knows(self, table: Tensor, index: Tensor) -> bool:
        if (kernels := lookup_kernels(table, index)) is not None:
            return kernels.knows_rows(table, index, self.low, self.high, COMPARED)
        index = index.reshape(-1)[:COMPARED]
        low, high = _extremes(table.detach()[index])
        return torch.equal(low, self.low[index]) and torch.equal(high, self.high[index])

    def after_step(self, optimizer: Optimizer) -> None:
        """Looks at the rows that a step has written to, if it is known which."""
        table = self._table()
        if table is None or (gradient := table.grad) is None or (group := _group_of(optimizer, table)) is None:
            return
        # Rows alone are sparse; a gradient that names none may have been cleared by a hook of the step's.
        named = gradient.is_sparse and gradient.sparse_dim() == 1 and gradient._nnz() > 0
        rows = gradient._indices()[0] if named and _writes_rows_alone(optimizer, group) else None
        if rows is not None and self._state is not None and _state(table) == (self._state[0], self._state[1] + 1):
            self._look_again(table, rows)
            self._state = _state(table)
        else:
            self._followed, self._state = gradient.is_sparse, None

    def _look_again(self, table: Tensor, rows: Tensor) -> None:
        if (kernels := lookup_kernels(table, rows)) is not None:
            if kernels.follow_rows(table, rows, self.low, self.high, self.bounds):
                self._qparams = None
            return
        rows = rows.view(-1)
        with torch.no_grad():
            old_low, old_high = self.low[rows], self.high[rows]
            self.low[rows], self.high[rows] = low, high = _extremes(table[rows])
            lowest, highest = self.bounds
            # Where a row that held an extreme (or a NaN) has let go of it, all rows are asked.
            let_go = ~(old_low > lowest) & ~(low <= lowest), ~(old_high < highest) & ~(high >= highest)
            some_low, some_high = torch.stack([part.any() for part in let_go]).tolist()
            self.bounds = torch.stack((
                self.low.amin() if some_low else torch.minimum(lowest, low.amin()),
                self.high.amax() if some_high else torch.maximum(highest, high.amax()),
            ))  # fmt: skip
        self._qparams = None


#: Those that live.
_FOLLOWED: weakref.WeakSet[RowExtremes] = weakref.WeakSet()
_HOOKS: list[Any] = []


def _watch_steps() -> None:
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for followed in list(_FOLLOWED):
        followed.after_step(optimizer)


def _group_of(optimizer: Optimizer, table: Tensor) -> dict[str, Any] | None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter is table:
                return group
    return None


def _writes_rows_alone(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Returns whether a step writes to rows of a table whose gradient is not 0 and to no other, in one operation."""
    if type(optimizer) is SparseAdam:
        return True
    # With momentum a row goes on moving that was read earlier, with weight decay all do.
    return type(optimizer) in (SGD, Adagrad) and not group.get("momentum") and not group["weight_decay"]


def _state(table: Tensor) -> tuple[int, int]:
    return table.data_ptr(), table._version


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high = extremes(rows, (rows.shape[0], 1))
    return low.view(-1).float(), high.view(-1).float()
