"""Weights of layers as the matrices that GPTQ solves for, those of one input side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.layers import QuantizedLayer, current_weight_quantizer
from lq_plugin.ptq.gptq.hessian import InputHessian
from lq_plugin.ptq.layerwise.write import write_rounded
from lq_plugin.quantizers import WeightQuantizer


@dataclass(eq=False)
class Problem:
    """The weight of one layer.

    Args:
        layer: that the weight is of.
        levels: of its quantizer, as they are kept.
        weight, nearest: the weight, and rounded to nearest, `[groups, rows, columns]`.
        of_each: the levels with a scale for each element.
    """

    layer: QuantizedLayer
    levels: FixedLevels
    weight: Tensor
    nearest: Tensor
    of_each: FixedLevels

    @classmethod
    def of(cls, layer: QuantizedLayer, inputs: InputHessian, device: torch.device) -> Problem:
        """Returns the problem of a layer.

        Args:
            layer: with a calibrated weight quantizer.
            inputs: of the layer.
            device: that is solved on.
        """
        quantizer = current_weight_quantizer(layer)
        assert quantizer is not None
        canonical = type(layer).canonical(layer, layer.weight)
        levels = quantizer.fixed_levels(blocks(canonical.detach().float(), quantizer.spec.granularity))
        of_each = _elementwise(levels, quantizer, canonical).mapped(lambda t: inputs.to_matrix(t.to(device)))
        weight, nearest = (inputs.to_matrix(t.to(device)) for t in (canonical, quantizer(canonical)))
        return cls(layer, levels, weight, nearest, of_each)

    def write(self, values: Tensor) -> None:
        """Writes rounded values, `[groups, rows, columns]`, into the layer."""
        canonical = type(self.layer).canonical(self.layer, self.layer.weight)
        write_rounded(self.layer, values.reshape(canonical.shape).to(canonical.device), self.levels)


def joined(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Returns the problems in groups that can be solved as one: integer levels of one grid."""
    levels = [problem.of_each for problem in problems]
    integers = [of for of in levels if type(of) is IntegerLevels]
    if len(integers) == len(levels) and len({of.grid for of in integers}) == 1:
        return [list(problems)]
    return [[problem] for problem in problems]


def stacked(problems: Sequence[Problem]) -> tuple[Tensor, Tensor, FixedLevels]:
    """Returns weights, nearest rounding and levels of problems that `joined` gave, their rows below each other."""
    first, *others = problems
    if not others:
        return first.weight, first.nearest, first.of_each
    weight, nearest, scale, zero_point = (
        torch.cat(parts, dim=-2)
        for parts in zip(*((p.weight, p.nearest, p.of_each.scale, p.of_each.zero_point) for p in problems), strict=True)
    )
    return weight, nearest, replace(first.of_each, scale=scale, zero_point=zero_point)


def _elementwise(levels: FixedLevels, quantizer: WeightQuantizer, weight: Tensor) -> FixedLevels:
    """Returns the levels with a scale for each element, of the canonical weight's shape."""
    granularity = quantizer.spec.granularity
    shape = blocks(torch.empty(weight.shape, device="meta"), granularity).shape
    return levels.mapped(lambda t: unblocks(t.expand(shape), weight.shape, granularity))
