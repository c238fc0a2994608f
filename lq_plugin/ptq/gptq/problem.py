"""The weight of a layer as the matrix that GPTQ solves for, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lq_plugin.functional.coordinate_descent import descend
from lq_plugin.functional.fixed_levels import FixedLevels
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.intent.spec import PerBlock, PerMatrix
from lq_plugin.layers import QuantizedLayer, current_weight_quantizer
from lq_plugin.ptq.layerwise.write import write_rounded

#: Elements that are solved for at a time: what is held of them takes some ten times their float32.
_ELEMENTS = 2**18


@dataclass(eq=False)
class Problem:
    """The weight of one layer.

    Args:
        layer: with a calibrated weight quantizer.
        groups: matrices that have inputs of their own.
        device: that is solved on.
    """

    layer: QuantizedLayer
    groups: int
    device: torch.device

    def __post_init__(self) -> None:
        quantizer = current_weight_quantizer(self.layer)
        assert quantizer is not None
        self.granularity = quantizer.spec.granularity
        self.canonical = type(self.layer).canonical(self.layer, self.layer.weight).detach()
        self.levels = quantizer.fixed_levels(blocks(self.canonical.float(), self.granularity))

    @property
    def weight(self) -> Tensor:
        """The weight, `[groups, rows, columns]`."""
        return self._matrix(self.canonical).to(self.device)

    def nearest(self) -> Tensor:
        """Returns the weight as its quantizer rounds it, `[groups, rows, columns]`."""
        quantizer = current_weight_quantizer(self.layer)
        assert quantizer is not None
        return self._matrix(quantizer(self.canonical)).to(self.device)

    def parts(self) -> Iterator[tuple[slice, FixedLevels]]:
        """Yields rows that are solved for at a time, and their levels with a scale for each element.

        All rows where there are several groups, or rows share a scale.
        """
        rows = len(self.canonical)
        whole = self.groups > 1 or isinstance(self.granularity, (PerBlock, PerMatrix))
        step = rows if whole else max(_ELEMENTS // max(self.canonical[0].numel(), 1), 1)
        for first in range(0, rows, step):
            some = slice(first, min(first + step, rows))
            yield slice(0, rows // self.groups) if whole else some, self._levels_of(some, whole)

    def _levels_of(self, some: slice, whole: bool) -> FixedLevels:
        shape = tuple(self.canonical[some].shape)
        laid_out = blocks(torch.empty(shape, device="meta"), self.granularity).shape

        def of_each(t: Tensor) -> Tensor:
            mine = t if whole or len(t) == 1 else t[some]
            return self._matrix(unblocks(mine.expand(laid_out), shape, self.granularity)).to(self.device)

        return self.levels.mapped(of_each)

    def column_sets(self) -> list[Tensor]:
        """Returns the columns that share a scale in each row, as sets; one of all where rows share scales."""
        scale, shape = self.levels.scale, (1, *self.canonical.shape[1:])
        if len(scale) != len(self.canonical):
            return [torch.arange(self.canonical[0].numel())]
        numbers = torch.arange(scale[0].numel()).view(1, *scale.shape[1:])
        laid_out = blocks(torch.empty(shape, device="meta"), self.granularity).shape
        mine = unblocks(numbers.expand(laid_out), shape, self.granularity).flatten()
        return [(mine == number).nonzero().squeeze(1).to(self.device) for number in range(numbers.numel())]

    def descend(self, target: Tensor, values: Tensor, hessian: Tensor, sweeps: int) -> tuple[Tensor, Tensor | None]:
        """Returns values by coordinate descent, `[groups, rows, columns]`, and their scales for `take_scales`.

        Args:
            target: what is rounded, of the same shape.
            values: rounded.
            hessian: dampened, `[groups, columns, columns]`.
            sweeps: see `lq_plugin.functional.coordinate_descent`.
        """
        sets, done = self.column_sets(), torch.empty_like(values)
        own = len(self.levels.scale) == len(self.canonical)
        scales = torch.empty(*values.shape[:2], len(sets), device=values.device)
        for rows, levels in self.parts():
            levels = levels if own else replace(levels, trainable=False)
            for group in range(self.groups):
                mine = levels.mapped(lambda t: t[group])  # noqa: B023
                done[group, rows], scale = descend(
                    target[group, rows], values[group, rows], hessian[group], mine, sets, sweeps
                )
                scales[group, rows] = scale[:, [int(some[0]) for some in sets]]
        return done, scales if own and self.levels.trainable else None

    def take_scales(self, scales: Tensor, rows: Tensor) -> None:
        """Gives rows of the levels the scales that `descend` has found.

        Args:
            scales: `[groups, rows, scales of a row]`.
            rows: which, bool `[groups, rows]`.
        """
        held = self.levels.scale
        scale = torch.where(rows.unsqueeze(-1), scales, held.reshape(scales.shape).to(scales.device))
        self.levels = replace(self.levels, scale=scale.reshape(held.shape).to(held.device))

    def write(self, values: Tensor) -> None:
        """Writes rounded values, `[groups, rows, columns]`, into the layer."""
        write_rounded(self.layer, values.reshape(self.canonical.shape).to(self.canonical.device), self.levels)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
