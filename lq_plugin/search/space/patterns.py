"""A search space over patterns, for a model that is not known: one choice for all layers that a pattern matches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from optuna.distributions import BaseDistribution

from lq_plugin.errors import PlanError, raise_all
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import QuantPlan, Rule
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.search.space.model_space import Params, Unit, params_of, uniform_choice
from lq_plugin.search.space.space import Space, SpaceRule


@dataclass(frozen=True)
class PatternSpace:
    """Plans with the rules of `base`, then one rule for each pattern.

    A pattern that matches no layer is an error of the job, which has the model.

    Args:
        space: its `rules` name the patterns; its own choices are those of the pattern `*`.
        base: its rules come first; its schedule is that of every plan.

    Raises:
        PlanError: nothing to choose, or ties, which patterns make needless.

    >>> rules = [{"match": "conv*", "weight": {"bit_widths": [2, 4]}}]
    >>> space = PatternSpace.parse({"input": "uint8 affine ema", "rules": rules})
    >>> space.distributions
    {'conv*.weight.bits': IntDistribution(high=4, log=False, low=2, step=2)}
    >>> space.plan({"conv*.weight.bits": 4}).rules[1]
    Rule(match='conv*', weight=QuantSpec('int4'), input=None, output=None, start=None)
    """

    space: Space
    base: QuantPlan | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.space.tie:
            faults.append(
                f"tie={list(self.space.tie)}: layers of one pattern share a choice anyway; write a pattern that "
                "matches them all"
            )
        patterns = [rule.match for rule in self._rules]
        faults += [
            f"{pattern!r} has {patterns.count(pattern)} rules"
            for pattern in dict.fromkeys(patterns)
            if patterns.count(pattern) > 1
        ]
        if not faults and not self.distributions:
            faults.append("there is nothing to choose: every tensor has at most one choice")
        raise_all(PlanError, "layers", faults)

    @classmethod
    def parse(cls, layers: Mapping[str, Any]) -> PatternSpace:
        """Reads the fields of a `Space`, and `plan`: anything `QuantPlan.parse` reads, or None."""
        if not isinstance(layers, Mapping):
            raise PlanError(f"layers is a mapping, {{rules: [...]}}, got {layers!r}")
        fields = dict(layers)
        base = fields.pop("plan", None)
        return cls(Space.parse(fields), None if base is None else QuantPlan.parse(base))

    @property
    def _rules(self) -> list[SpaceRule]:
        first = SpaceRule("*", self.space.weight, self.space.input, self.space.output)
        rest = [rule for rule in self.space.rules if isinstance(rule, SpaceRule)]
        return [rule for rule in (first, *rest) if any(getattr(rule, slot) is not None for slot in SLOTS)]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The tensors that are chosen together: those of one slot in all layers of a pattern."""
        return tuple(
            Unit(f"{rule.match}.{slot}", slot, (rule.match,), tuple(choices))
            for rule in self._rules
            for slot in SLOTS
            if (choices := getattr(rule, slot)) is not None
        )

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every Optuna parameter, by name."""
        return {name: distribution for unit in self.units for name, distribution in unit.distributions.items()}

    def plan(self, params: Mapping[str, Any]) -> QuantPlan:
        """Returns the plan for values of the parameters."""
        chosen: dict[str, dict[str, Any]] = {}
        for unit in self.units:
            chosen.setdefault(unit.layers[0], {})[unit.slot] = unit.choice(params)
        rules = [Rule(match, **slots) for match, slots in chosen.items()]
        return QuantPlan(rules) if self.base is None else QuantPlan([*self.base.rules, *rules], self.base.schedule)

    def uniform(self) -> list[Params]:
        """Returns parameters for each bit-width, used for all weights; everything else is at its first choice."""
        specs = [choice for unit in self.units if unit.slot == "weight" for choice in unit.choices]
        widths = sorted({spec.bit_width for spec in specs if isinstance(spec, QuantSpec)}, reverse=True)
        return [params_of(self.units, partial(uniform_choice, bit_width=bits)) for bits in widths]

    def describe(self) -> dict[str, Any]:
        """Returns plain values: equal spaces have equal descriptions."""
        return {
            "plan": None if self.base is None else self.base.to_dict(),
            "choices": {unit.name: [str(choice) for choice in unit.choices] for unit in self.units},
        }
