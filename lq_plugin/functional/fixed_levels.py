"""Levels under scales that stay: what learned rounding and GPTQ choose from, whatever the format.

A weight w may become s · l, with s the step of its block and l one of the format's levels:

| class | levels l | formats |
|---|---|---|
| `IntegerLevels` | q - z for q in `quant_min..quant_max` | int, its scales float or integer; mx4, mx6, mx9; q4_0 |
| `TableLevels` | the numbers of a table | mxfp4 and the other OCP MX formats, nvfp4, fp8, seq, twn |

Blocks of `if4` have either (`lq_plugin.quantizers.if4`).

Levels of a table need not lie evenly: between 4 and 6 a weight of MXFP4 has no choice but these two. Halfway between
two levels the one at an even distance from the middle of the table is the nearest, which is "half to even" of floating
point numbers, whose codes are the distances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lq_plugin.functional.adaround import neighbours
from lq_plugin.functional.affine import fake_quantize
from lq_plugin.intent.spec import IntegerGrid

L = TypeVar("L", bound="FixedLevels")


@dataclass(frozen=True)
class FixedLevels:
    """Base of the levels that blocks of a weight may be rounded to.

    Args:
        scale: float32, as the quantizer keeps it, broadcastable to the blocks.
        zero_point: float32, broadcastable to the blocks; 0 where there is none.
        trainable: any positive number may be a scale, so that it can be learned.
    """

    scale: Tensor
    zero_point: Tensor
    trainable: bool

    @property
    def step(self) -> Tensor:
        """Factor of the levels."""
        return self.scale

    def neighbours(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the level below each weight, the one above, and its place between them, 0..1.

        Both are the outermost level where the weight is beyond it.

        Args:
            w: blocks.
        """
        raise NotImplementedError

    def nearest(self, w: Tensor) -> Tensor:
        """Returns each weight rounded to the nearest level, level times step."""
        raise NotImplementedError

    def mapped(self: L, change: Callable[[Tensor], Tensor]) -> L:
        """Returns the same levels with `change` made to the tensors that are laid out like the blocks."""
        return replace(self, scale=change(self.scale), zero_point=change(self.zero_point))


@dataclass(frozen=True)
class IntegerLevels(FixedLevels):
    """Integers less a zero point.

    >>> levels = IntegerLevels(torch.tensor(0.5), torch.tensor(0.0), True, IntegerGrid(-2, 1))
    >>> levels.nearest(torch.tensor([-3.0, 0.2, 0.3])).tolist()
    [-1.0, 0.0, 0.5]
    """

    grid: IntegerGrid

    def neighbours(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return neighbours(w, self.scale, self.zero_point, self.grid)

    def nearest(self, w: Tensor) -> Tensor:
        return fake_quantize(w, self.scale, self.zero_point, self.grid)


@dataclass(frozen=True)
class TableLevels(FixedLevels):
    """Ascending numbers, float32 `[levels]`.

    >>> from lq_plugin.functional.minifloat import E2M1, signed_values
    >>> levels = TableLevels(torch.tensor(1.0), torch.tensor(0.0), False, signed_values(E2M1))
    >>> low, high, place = levels.neighbours(torch.tensor([-0.1, 4.5, 7.0]))
    >>> low.tolist(), high.tolist(), place.tolist()[1:]
    ([-0.5, 4.0, 6.0], [0.0, 6.0, 6.0], [0.25, 0.0])
    >>> levels.nearest(torch.tensor([0.25, 0.75, 5.0, 5.1, 7.0])).tolist()
    [0.0, 1.0, 4.0, 6.0, 6.0]
    """

    table: Tensor

    def neighbours(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table, ratio = self.table.to(w.device), (w.detach().float() / self.step).contiguous()
        above = torch.bucketize(ratio, table, right=True)
        low, high = table[(above - 1).clamp(min=0)], table[above.clamp(max=len(table) - 1)]
        span = high - low
        place = torch.where(span > 0, (ratio - low) / torch.where(span > 0, span, 1.0), 0.0)
        return low, high, place.clamp(0.0, 1.0)

    def nearest(self, w: Tensor) -> Tensor:
        step = self.step
        table, ratio = self.table.to(w.device), (w.detach().float() / step).contiguous()
        middles = (table[1:] + table[:-1]) / 2
        lower, upper = torch.bucketize(ratio, middles), torch.bucketize(ratio, middles, right=True)
        # They differ halfway between two levels alone.
        index = torch.where((lower - len(table) // 2) % 2 == 0, lower, upper)
        return table[index] * step
