"""The search space of one model: its Optuna parameters, and the plan for values of them.

A tensor with choices has two parameters, `stem.0.weight.bits` (an ordered number) and
`stem.0.weight.scheme` (everything else); where the choices are not a full product of both, one
categorical parameter `stem.0.weight`. What is fixed has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, TypeAlias, cast

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from lq_plugin.errors import PlanError
from lq_plugin.intent.layer_plan import as_written, for_layer
from lq_plugin.intent.plan import FLOAT, LayerInfo, LayerPlan, QuantPlan, Rule
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.model.measure.energy import FLOAT_BITS
from lq_plugin.utilities.moved import former_names

__getattr__ = former_names(__name__)

#: A spec, or `"float"`.
Choice: TypeAlias = "QuantSpec | str"
Params: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Tensors that share one choice: one tensor, or that of several tied layers.

    Args:
        name: `"stem.0.weight"`, the prefix of its parameters.
        slot: `"weight"`, `"input"` or `"output"`.
        layers: names of the layers.
        choices: what it may be, the preferred ones first.
    """

    name: str
    slot: str
    layers: tuple[str, ...]
    choices: tuple[Choice, ...]

    @cached_property
    def _table(self) -> dict[tuple[int, str], Choice] | None:
        """The choices by bit-width and scheme; None where a bit-width does not come with every scheme."""
        specs = [choice for choice in self.choices if isinstance(choice, QuantSpec)]
        table: dict[tuple[int, str], Choice] = {(spec.bit_width, _scheme(spec)): spec for spec in specs}
        full = len({bits for bits, _ in table}) * len({scheme for _, scheme in table})
        return table if full == len(self.choices) else None

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters of this unit; none when there is one choice."""
        if len(self.choices) == 1:
            return {}
        if self._table is None:
            return {self.name: CategoricalDistribution([str(choice) for choice in self.choices])}
        bits = sorted({bits for bits, _ in self._table})
        schemes = list(dict.fromkeys(scheme for _, scheme in self._table))
        found: dict[str, BaseDistribution] = {}
        if len(bits) > 1:
            found[f"{self.name}.bits"] = _ordered(bits)
        if len(schemes) > 1:
            found[f"{self.name}.scheme"] = CategoricalDistribution(schemes)
        return found

    def choice(self, params: Mapping[str, Any]) -> Choice:
        """Returns the choice for values of its parameters."""
        if len(self.choices) == 1:
            return self.choices[0]
        if self._table is None:
            return next(choice for choice in self.choices if str(choice) == params[self.name])
        default_bits, default_scheme = next(iter(self._table))
        return self._table[
            params.get(f"{self.name}.bits", default_bits), params.get(f"{self.name}.scheme", default_scheme)
        ]

    def params(self, choice: Choice) -> Params:
        """Returns the values of its parameters for a choice: the inverse of `choice`.

        Raises:
            PlanError: when it is none of the choices.
        """
        if choice not in self.choices:
            raise PlanError(
                f"{self.name}: '{choice}' is not in the search space; choices: {', '.join(map(str, self.choices))}"
            )
        if self._table is None or not isinstance(choice, QuantSpec):
            values: Params = {self.name: str(choice)}
        else:
            values = {f"{self.name}.bits": choice.bit_width, f"{self.name}.scheme": _scheme(choice)}
        return {name: value for name, value in values.items() if name in self.distributions}

    def nearest(self, bit_width: int) -> Choice:
        """Returns the choice nearest to a bit-width; of two equally near the wider, of equal ones the first."""

        return min(self.choices, key=lambda choice: (abs(bits_of(choice) - bit_width), -bits_of(choice)))


def bits_of(choice: Choice) -> int:
    """Returns the bits of an element under a choice."""
    return choice.bit_width if isinstance(choice, QuantSpec) else FLOAT_BITS


def params_of(units: Iterable[Unit], choose: Callable[[Unit], Choice]) -> Params:
    """Returns the values of all parameters, with the choice of each unit that `choose` returns."""
    return {name: value for unit in units for name, value in unit.params(choose(unit)).items()}


def uniform_choice(unit: Unit, bit_width: int) -> Choice:
    """Returns the choice of a unit in a plan whose weights all have one bit-width, or are nearest to it."""
    return unit.nearest(bit_width) if unit.slot == "weight" else unit.choices[0]


@dataclass(frozen=True)
class ModelSpace:
    """The space of one model, made by `Space.bind`.

    Args:
        units: what is chosen together, in the model's order.
        layers: the layers that can hold quantizers.
        others: names and types of all other modules.
        excluded: choices that a tensor cannot take, with the reason, by `"layer.slot"`.
        target: name of the export target that its plans are for, if any.
    """

    units: tuple[Unit, ...]
    layers: tuple[LayerInfo, ...]
    others: dict[str, str] = field(default_factory=dict)
    excluded: dict[str, list[str]] = field(default_factory=dict)
    target: str | None = None

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter of the search, by name."""
        return {name: distribution for unit in self.units for name, distribution in unit.distributions.items()}

    @property
    def size(self) -> int:
        """Number of different plans."""
        total = 1
        for unit in self.units:
            total *= len(unit.choices)
        return total

    def suggest(self, trial: Trial) -> Params:
        """Asks Optuna for a value of every parameter."""
        for name, distribution in self.distributions.items():
            if isinstance(distribution, IntDistribution):
                trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
            elif isinstance(distribution, CategoricalDistribution):
                trial.suggest_categorical(name, distribution.choices)
        return trial.params

    def layer_plans(self, params: Mapping[str, Any]) -> dict[str, LayerPlan]:
        """Returns the specs of every layer for values of the parameters."""
        return dict(self._planned(frozenset(params.items())))

    @cached_property
    def _planned(self) -> Callable[[frozenset[tuple[str, Any]]], dict[str, LayerPlan]]:
        # A trial's plan is made when it is proposed, and wanted again when it is evaluated.
        return lru_cache(maxsize=64)(self._layer_plans)

    def _layer_plans(self, values: frozenset[tuple[str, Any]]) -> dict[str, LayerPlan]:
        params = dict(values)
        infos = {layer.name: layer for layer in self.layers}
        chosen: dict[str, dict[str, QuantSpec]] = {name: {} for name in infos}
        for unit in self.units:
            choice = unit.choice(params)
            if isinstance(choice, QuantSpec):
                for name in unit.layers:
                    chosen[name][unit.slot] = for_layer(infos[name], unit.slot, choice)
        return {name: LayerPlan(**cast(dict[str, Any], specs)) for name, specs in chosen.items()}

    def plan(self, params: Mapping[str, Any]) -> QuantPlan:
        """Returns the plan for values of the parameters, with one rule for each layer."""
        return as_plan(self.layer_plans(params), self.target)

    def params(self, plan: QuantPlan) -> Params:
        """Returns the values of the parameters for a plan.

        Raises:
            PlanError: naming a tensor whose spec is not in the space, or tied layers that differ.
        """
        layer_plans = plan.resolve(self.layers, self.others)
        values: Params = {}
        for unit in self.units:
            wanted: set[Choice] = {as_written(getattr(layer_plans[name], unit.slot)) or FLOAT for name in unit.layers}
            if len(wanted) > 1:
                raise PlanError(
                    f"{unit.name} ties {', '.join(unit.layers)}, the plan gives them "
                    f"{', '.join(sorted(map(str, wanted)))}"
                )
            values |= unit.params(wanted.pop())
        return values

    @property
    def bit_widths(self) -> list[int]:
        """Every bit-width that some weight may have, ascending."""
        specs = [choice for unit in self.units if unit.slot == "weight" for choice in unit.choices]
        return sorted({spec.bit_width for spec in specs if isinstance(spec, QuantSpec)})

    def uniform(self, bit_width: int) -> Params:
        """Returns parameters with all weights at (or nearest to) one bit-width, everything else at its first choice."""
        return params_of(self.units, partial(uniform_choice, bit_width=bit_width))

    def describe(self) -> dict[str, list[str]]:
        """Returns the choices of every tensor as plain strings: equal spaces have equal descriptions."""
        return {
            " = ".join(f"{layer}.{unit.slot}" for layer in unit.layers): [str(choice) for choice in unit.choices]
            for unit in self.units
        }


def as_plan(layer_plans: Mapping[str, LayerPlan], target: str | None = None) -> QuantPlan:
    """Returns a plan with one rule for each layer that is not all float, for an export target if one is named.

    Raises:
        PlanError: when all are.
    """
    return QuantPlan(
        [Rule(_exactly(name), plan.weight, plan.input, plan.output) for name, plan in layer_plans.items() if plan],
        target=target,
    )


def _exactly(name: str) -> str:
    """Returns a pattern that matches this name alone."""
    return f"re:{re.escape(name)}" if re.search(r"[*?\[\]]", name) else name


def _scheme(spec: QuantSpec) -> str:
    """Returns a spec without its bit-width: `"int per_channel mse"`."""
    words = [f"{'' if spec.signed else 'u'}{spec.format}", str(spec.granularity)]
    words += ["affine"] * spec.affine + ["narrow"] * spec.narrow_range + [spec.range]
    return " ".join(words + [spec.rounding] * (spec.rounding != "nearest"))


def _ordered(bits: list[int]) -> BaseDistribution:
    step = bits[1] - bits[0]
    if bits == list(range(bits[0], bits[-1] + 1, step)):
        return IntDistribution(bits[0], bits[-1], step=step)
    return CategoricalDistribution(bits)
