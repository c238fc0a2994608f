"""The door for learned ranges: `register_learned_range` gives a range of integer specs its quantizers.

>>> import torch
>>> from torch import nn
>>> from lq_plugin import QuantSpec
>>> from lq_plugin.functional.grouping import blocks, unblocks
>>> from lq_plugin.quantizers import WeightQuantizer, make_weight_quantizer
>>> class Step(WeightQuantizer):
...     def make_qparams(self):
...         self.scale = nn.Parameter(torch.ones(self.scale_shape))
...         self.register_buffer("zero_point", torch.zeros(self.scale_shape))
...     def qparams(self, x=None):
...         return self.scale.detach(), self.zero_point
...     def quantize_values(self, x):
...         w, grid = blocks(x, self.spec.granularity) / self.scale, self.spec.grid
...         levels = w.clamp(grid.quant_min, grid.quant_max)
...         return unblocks((levels + (levels.round() - levels).detach()) * self.scale, x.shape, self.spec.granularity)
>>> register_learned_range("doc_step", "a step that the optimizer trains", start="mse", weight=Step)
>>> type(make_weight_quantizer(QuantSpec.parse("int4 per_channel doc_step"), "weight", (8, 4))).__name__
'Step'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lq_plugin.errors import SpecError, name_fault, raise_all
from lq_plugin.intent.ranges import RANGES, OptionCheck, RangeKind, declare_range
from lq_plugin.intent.spec import IntegerGrid, QuantSpec
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer
from lq_plugin.ranges.registry import RangeFunction, range_function, register_range, registered_ranges
from lq_plugin.ranges.sample import Sample

WeightMaker: TypeAlias = Callable[[QuantSpec, str, tuple[int, ...]], WeightQuantizer]
ActivationMaker: TypeAlias = Callable[[QuantSpec, str, int, int], ActivationQuantizer]


@dataclass(frozen=True)
class _Makers:
    weight: WeightMaker | None
    activation: ActivationMaker | None

    def names(self) -> list[str]:
        """Returns them by module and name: a module that is loaded again makes the same ones anew."""
        makers: list[Any] = [maker for maker in (self.weight, self.activation) if maker is not None]
        return [f"{maker.__module__}.{maker.__qualname__}" for maker in makers]


_LEARNED: dict[str, _Makers] = {}


def register_learned_range(
    name: str,
    summary: str,
    *,
    start: RangeFunction | str,
    weight: WeightMaker | None = None,
    activation: ActivationMaker | None = None,
    option: OptionCheck | None = None,
    non_negative: bool = False,
    check: Callable[[QuantSpec], list[str]] | None = None,
) -> None:
    """Makes a range that the optimizer trains usable by its name in specs of integers.

    A quantizer keeps its parameters in `make_qparams`, takes their start in `store_qparams` (an activation's also in
    `store_bounds`), says scale and zero point in `qparams`, and rounds in `quantize_values`, through which gradients
    reach the parameters. The optimizer gets them, without weight decay where `no_weight_decay` names them.

    Args:
        name: a lower-case word, as it stands in a spec.
        summary: the line that error messages and docs show.
        start: finds the first bounds from statistics: a function as `register_range` takes, or the name of a range.
        weight: makes the quantizer of a weight from `(spec, tensor's name, shape [C_out, C_in / groups, *kernel])`; a
            `WeightQuantizer` class does. None: weights are refused.
        activation: makes the quantizer of an input, output or operand from `(spec, tensor's name, channels, their
            axis)`; an `ActivationQuantizer` class does. None: activations are refused.
        option: checks the text after the colon; None: the range takes no option.
        non_negative: it is of values from 0 on, under `uint` without `affine`.
        check: returns what else a spec with this range must not be.

    Raises:
        SpecError: the name is taken, there is no quantizer, or no range named `start`. Nothing is registered then.
    """
    makers = _Makers(weight, activation)
    faults = [] if makers.names() else ["give weight, activation, or both"]
    if isinstance(start, str) and start not in registered_ranges():
        faults.append(f"start: {name_fault('range', start, registered_ranges())}")
    if name in RANGES and (name not in _LEARNED or _LEARNED[name].names() != makers.names()):
        faults.append(f"the name is taken: {RANGES[name]}")
    raise_all(SpecError, f"cannot register the learned range {name!r}", faults)
    register_range(name, summary, option=option, compared=False)(_first_bounds(start))
    slots = (*(["weight"] if weight else []), *(["input", "output"] if activation else []))
    kind = RangeKind(option, compared=False, slots=slots, learned=True, non_negative=non_negative, check=check)
    declare_range(name, summary, kind)
    give_quantizers(name, weight, activation)


def give_quantizers(name: str, weight: WeightMaker | None, activation: ActivationMaker | None) -> None:
    """Gives a learned range that is declared and has its start the quantizers that train it.

    Args:
        name: of the range.
        weight, activation: as in `register_learned_range`.
    """
    _LEARNED[name] = _Makers(weight, activation)


def learned_weight(spec: QuantSpec) -> WeightMaker | None:
    """Returns the maker of weight quantizers whose range is that of a spec; None: it is not learned."""
    return _LEARNED[spec.range_name].weight if spec.range_name in _LEARNED else None


def learned_activation(spec: QuantSpec) -> ActivationMaker | None:
    """Returns the maker of activation quantizers whose range is that of a spec; None: it is not learned."""
    return _LEARNED[spec.range_name].activation if spec.range_name in _LEARNED else None


def _first_bounds(start: RangeFunction | str) -> RangeFunction:
    if not isinstance(start, str):
        return start
    known = range_function(start)

    def first_bounds(sample: Sample, grid: IntegerGrid, option: str | None) -> tuple[Tensor, Tensor]:
        return known(sample, grid, None)

    return first_bounds
