"""Sensitivity from the step that each tensor's quantizer learns at each bit-width: LIMPQ's indicators of importance.

A tensor has one step for each bit-width, as in LSQ. In each round the loss is taken with every tensor at the lowest
bit-width, then at the next, and so on, then once with bit-widths drawn at random; the gradients of all these add up to
one update of all steps. Where a coarse step is not driven down by the loss, the tensor bears it badly. The sum over a
plan's tensors is what an integer program makes small, weights counted `WEIGHTS` times.

Unlike in the paper, weights of the model stay as they are and batch norms use their running statistics: this is a
measurement, not a training. Steps begin with the calibrated ranges, which are close to where they end, and are learned
in their logarithm.

Reference: Tang et al., "Mixed-Precision Neural Network Quantization via Learned Layer-wise Importance", ECCV 2022
(arXiv 2203.08368); the weight of weights is that of its published code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.functional.grouping import blocks
from lq_plugin.functional.lsq import fake_quantize_learned
from lq_plugin.intent.plan import FLOAT
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.layers import QuantizedLayer
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.sensitivity.curvature import asking, together
from lq_plugin.search.space.model_space import Unit, params_of

#: Rounds, and how far a step can move in one of them, relatively.
ROUNDS, RATE = 40, 0.05
#: How often a weight's step counts, an input's counting once.
WEIGHTS = 2.0


class _Range(NamedTuple):
    grid: IntegerGrid
    scale: Tensor
    zero_point: Tensor


class _Steps(nn.Module):
    """A stand-in for a quantizer, with one learned step for each bit-width.

    Args:
        ranges: by bit-width, where the steps begin.
    """

    def __init__(self, ranges: dict[int, _Range]) -> None:
        super().__init__()
        self.ranges = ranges
        self.logarithms = nn.ParameterDict(
            {str(bits): nn.Parameter(torch.zeros_like(given.scale)) for bits, given in ranges.items()}
        )
        self.bits = min(ranges)

    def step(self, bits: int) -> Tensor:
        y: Tensor = self.ranges[bits].scale * self.logarithms[str(bits)].exp()
        return y

    def forward(self, x: Tensor) -> Tensor:
        given = self.ranges[self.bits]
        return fake_quantize_learned(x, self.step(self.bits), given.zero_point, given.grid)


def by_learned_steps(
    evaluator: Evaluator, units: Sequence[Unit], module: nn.Module, data: Sequence[Any], loss: Callable[[Any], Tensor]
) -> dict[str, dict[str, float]]:
    """Returns the sum of the learned steps of each unit's tensors, by unit and choice.

    Float has no step: its sum is 0. A tensor with one choice keeps it.

    Args:
        evaluator: calibrated.
        units: with choices on a grid of integers, or float.
        module: whose parameters stay as they are.
        data: batches, used in turn.
        loss: of a batch.

    Raises:
        QuantizationError: a choice that is not on a grid of integers, or a loss that depends on none of them.
    """
    faults = [
        f"{unit.name}: '{choice}' has no step"
        for unit in units
        for choice in unit.choices
        if isinstance(choice, QuantSpec) and not choice.has_free_scales
    ]
    raise_all(
        QuantizationError, "measure 'learned_step' is for integers; kl, sqnr and loss are for all formats", faults
    )
    found = {unit.name: _stand_ins(evaluator, unit) for unit in units}
    space = evaluator.space
    assert space is not None
    first = params_of(space.units, lambda unit: unit.choices[0])
    evaluator.apply(space.layer_plans(first))
    for unit in units:
        for layer, steps in found[unit.name]:
            setattr(layer, f"{unit.slot}_quantizer", steps)
    tensors = [steps for same in found.values() for _, steps in same]
    own = {id(p) for steps in tensors for p in steps.parameters()}
    with asking([p for p in module.parameters() if id(p) not in own], wanted=False), torch.enable_grad():
        _learn(tensors, data, loss)
    return {
        unit.name: {str(choice): _harm(unit, choice, found[unit.name]) for choice in unit.choices} for unit in units
    }


def _learn(tensors: list[_Steps], data: Sequence[Any], loss: Callable[[Any], Tensor]) -> None:
    optimizer = torch.optim.Adam([p for steps in tensors for p in steps.parameters()], lr=RATE)
    widths = sorted({bits for steps in tensors for bits in steps.ranges})
    draw = random.Random(0)
    for batch in islice(cycle(data), ROUNDS):
        optimizer.zero_grad()
        for width in (*widths, None):
            for steps in tensors:
                own = list(steps.ranges)
                steps.bits = draw.choice(own) if width is None else min(own, key=lambda bits: (abs(bits - width), bits))
            value = loss(batch)
            if not value.requires_grad:
                raise QuantizationError("measure 'learned_step': the loss does not depend on any of the tensors")
            value.backward()
        optimizer.step()


def _stand_ins(evaluator: Evaluator, unit: Unit) -> list[tuple[QuantizedLayer, _Steps]]:
    """Returns steps for each layer of a unit; layers that share a weight share them.

    Steps begin with the calibrated ranges of the first choice of each bit-width.
    """
    specs: dict[int, QuantSpec] = {}
    for choice in unit.choices:
        if isinstance(choice, QuantSpec):
            specs.setdefault(choice.bit_width, choice)
    ranges: list[dict[int, _Range]] = [{} for _ in unit.layers]
    for bits, spec in sorted(specs.items()):
        evaluator.apply(together([(unit, spec)]))
        for name, into in zip(unit.layers, ranges, strict=True):
            layer = evaluator.layers[name]
            parts = (
                blocks(type(layer).canonical(layer, layer.weight).detach(), spec.granularity)
                if unit.slot == "weight"
                else None
            )
            levels = getattr(layer, f"{unit.slot}_quantizer").levels(parts)
            assert levels is not None, "a range of integers is known"
            # One step a tensor: the range that holds those of all its parts.
            into[bits] = _Range(
                spec.grid, *(q.detach() for q in qparams_from_bounds(levels.low.min(), levels.high.max(), spec.grid))
            )
    shared: dict[object, _Steps] = {}
    made = []
    for name, own in zip(unit.layers, ranges, strict=True):
        layer = evaluator.layers[name]
        key = id(layer.weight) if unit.slot == "weight" else name
        made.append((layer, shared.setdefault(key, _Steps(own).to(layer.weight.device))))
    return made


def _harm(unit: Unit, choice: Any, found: list[tuple[QuantizedLayer, _Steps]]) -> float:
    if choice == FLOAT:
        return 0.0
    distinct = {id(steps): steps for _, steps in found}.values()
    return (WEIGHTS if unit.slot == "weight" else 1.0) * sum(
        float(steps.step(choice.bit_width).detach()) for steps in distinct
    )
