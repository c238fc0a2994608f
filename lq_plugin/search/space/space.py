"""The choices of a search: specs for every tensor of a model, by default and by rules.

The same space in YAML and in Python::

    weight: {bit_widths: [2, 3, 4, 6, 8],            Space(
             granularities: [per_tensor, per_channel],   weight={"bit_widths": [2, 3, 4, 6, 8], ...},
             ranges: [minmax, mse]}                      input="uint8 affine mse",
    input: uint8 affine mse                              rules=[SpaceRule("stem.0", weight="int8 per_channel")],
    rules:                                               tie=["block.*"],
      - {match: stem.0, weight: int8 per_channel}    )
    tie: ["block.*"]

The choices of one tensor are written as a spec (fixed), a list of specs and `float`, or a product of
`bit_widths`, `granularities` and `ranges`. Patterns are those of a plan; later rules win. `tie: residual` ties what
meets in residual sums, whatever its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from lq_plugin.errors import PlanError, QuantizationError, SpecError, name_faults, raise_all
from lq_plugin.export.planned import known_target
from lq_plugin.export.target import Target
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import FLOAT, LayerInfo, QuantPlan, Rule, matches
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.model.graph.recording import Recording
from lq_plugin.search.space.model_space import Choice, ModelSpace, Unit
from lq_plugin.search.space.residual import RESIDUAL, ResidualTies, residual_ties

#: How the choices of one tensor are written.
Choices: TypeAlias = "QuantSpec | str | Mapping[str, Any] | Sequence[QuantSpec | str | Mapping[str, Any]]"

#: Lists of a product, and the field of a `QuantSpec` that each one fills.
_PRODUCT = {"bit_widths": "bit_width", "granularities": "granularity", "ranges": "range"}
#: Patterns and specs are checked by `QuantPlan.resolve`; this stands before what it says.
_PLAN_TITLE = "the plan does not fit the model: "
_CONSTANT = tuple(f.name for f in fields(QuantSpec) if f.name not in _PRODUCT.values())


def parse_choices(value: Choices) -> tuple[Choice, ...]:
    """Returns the specs (and `"float"`) that `value` describes, each once, in the order in which they are written.

    Raises:
        SpecError: listing every one that is impossible.

    >>> parse_choices({"bit_widths": [2, 4], "granularities": ["per_tensor", "group16"], "ranges": "mse"})
    (QuantSpec('int2 mse'), QuantSpec('int4 mse'), QuantSpec('int2 group16 mse'), QuantSpec('int4 group16 mse'))
    >>> parse_choices(["int4 per_channel", "float"])
    (QuantSpec('int4 per_channel'), 'float')
    """
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found: list[Choice] = []
    faults: list[str] = []
    for entry in entries:
        for candidate in _product(entry, faults) if isinstance(entry, Mapping) else [entry]:
            try:
                found.append(FLOAT if candidate == FLOAT else QuantSpec.parse(candidate))
            except SpecError as error:
                faults.append(str(error))
    if not found and not faults:
        faults.append(f"no choices in {value!r}")
    raise_all(SpecError, "cannot read the choices", faults)
    return tuple(dict.fromkeys(found))


def _product(entry: Mapping[str, Any], faults: list[str]) -> list[dict[str, Any]]:
    unknown = name_faults("key", entry, (*_PRODUCT, *_CONSTANT))
    if "bit_widths" not in entry:
        unknown.append(f"a product of choices needs bit_widths, got {dict(entry)!r}")
    if unknown:
        faults += unknown
        return []
    constant = {key: entry[key] for key in _CONSTANT if key in entry}
    # Bit-widths vary fastest: the first granularity and range written are the preferred ones.
    axes = [key for key in reversed(_PRODUCT) if key in entry]
    lists = [
        list(item) if isinstance(item := entry[key], Sequence) and not isinstance(item, str) else [item] for key in axes
    ]
    return [
        {_PRODUCT[key]: item for key, item in zip(axes, combination, strict=True)} | constant
        for combination in itertools.product(*lists)
    ]


@dataclass(frozen=True)
class SpaceRule:
    """Other choices for the layers that `match`.

    Args:
        match: name, glob, `re:regex` or `type:ClassName`.
        weight, input, output: choices, or None to leave them as before.
    """

    match: str
    weight: Choices | None = None
    input: Choices | None = None
    output: Choices | None = None

    def __post_init__(self) -> None:
        Rule(self.match, weight=FLOAT)  # a plan's own check of the pattern
        _parse_slots(self, f"rule {self.match!r}")


@dataclass(frozen=True)
class Space:
    """Choices for every layer of a model.

    Args:
        weight, input, output: choices of all layers; None stays float.
        rules: `SpaceRule`s (or mappings) for some layers; later ones win, each tensor on its own.
        tie: patterns; the layers that one pattern matches always get the same choice. The word `residual` ties the
            weights of layers whose outputs meet in a residual sum, and the inputs of layers that read the same sum
            (`lq_plugin.search.space.residual`).

    Raises:
        QuantizationError: listing everything that is wrong in it.
    """

    weight: Choices | None = None
    input: Choices | None = None
    output: Choices | None = None
    rules: Sequence[SpaceRule | Mapping[str, Any]] = ()
    tie: Sequence[str] = ()

    def __post_init__(self) -> None:
        _parse_slots(self, "search space")
        for name, what in (("rules", "mappings"), ("tie", "patterns")):
            value = getattr(self, name)
            if not isinstance(value, Sequence | None) or (name == "rules" and isinstance(value, str)):
                raise PlanError(f"search space: {name} is a list of {what}, got {value!r}")
        rules = [rule if isinstance(rule, SpaceRule) else _from_mapping(SpaceRule, rule) for rule in self.rules or ()]
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "tie", (self.tie,) if isinstance(self.tie, str) else tuple(self.tie or ()))

    @classmethod
    def parse(cls, value: Space | Mapping[str, Any]) -> Space:
        """Reads a space from a mapping with its fields (YAML); a `Space` is returned unchanged."""
        return value if isinstance(value, Space) else _from_mapping(cls, value)

    @property
    def ties_residuals(self) -> bool:
        """True if `bind` needs a recording."""
        return RESIDUAL in self.tie

    def bind(
        self,
        layers: Sequence[LayerInfo],
        others: Mapping[str, str] | None = None,
        recording: Recording | None = None,
        target: str | None = None,
        modules: Mapping[str, Any] | None = None,
    ) -> ModelSpace:
        """Returns the space of one model.

        A choice that a layer cannot take (its input channels are no multiple of the group size, say), or that files of
        the target cannot hold, is left out for that layer, and named in `ModelSpace.excluded`.

        Args:
            layers: the layers that can hold quantizers.
            others: names and types of all other modules, for error messages.
            recording: of one float forward pass, where residual sums are tied.
            target: name of an export target; choices are those on its own grid.
            modules: the layers themselves by name, where there is a target.

        Raises:
            PlanError: patterns that match nothing, tensors left without a choice, or a space with nothing to choose.
        """
        patterns = [rule.match for rule in self._rules] + self._patterns
        if patterns:
            try:
                QuantPlan([Rule(pattern, weight=FLOAT) for pattern in patterns]).resolve(layers, others)
            except PlanError as error:
                raise PlanError(f"search space: {str(error).removeprefix(_PLAN_TITLE)}") from None
        faults: list[str] = []
        excluded: dict[str, list[str]] = {}
        allowed: dict[tuple[str, str], tuple[Choice, ...]] = {}
        for layer in layers:
            for slot in layer.slots:
                choices = _possible(layer, slot, self._choices(layer, slot), excluded)
                if target is not None:
                    module = (modules or {})[layer.name]
                    choices = _held(known_target(target), layer, slot, choices, module, excluded)
                if not choices:
                    faults.append(
                        f"{layer.name}.{slot} has no possible choice: {'; '.join(excluded[f'{layer.name}.{slot}'])}"
                    )
                elif choices != (FLOAT,):
                    allowed[layer.name, slot] = choices
        ties = ResidualTies((), ())
        if self.ties_residuals:
            if recording is None:
                raise PlanError("search space: tie 'residual' needs a recording of the model")
            ties = residual_ties(recording, [layer.name for layer in layers])
            if not ties.weight and not ties.input:
                faults.append(
                    "tie 'residual': the model has no sum in which the outputs of two layers meet, and none that two "
                    "layers read"
                )
        units = list(self._units(layers, allowed, ties, faults))
        if not faults and not any(len(unit.choices) > 1 for unit in units):
            faults.append("there is nothing to choose: every tensor has at most one choice")
        raise_all(PlanError, "search space", faults)
        return ModelSpace(tuple(units), tuple(layers), dict(others or {}), excluded, target)

    @property
    def _patterns(self) -> list[str]:
        return [pattern for pattern in self.tie if pattern != RESIDUAL]

    @property
    def _rules(self) -> tuple[SpaceRule, ...]:
        return tuple(rule for rule in self.rules if isinstance(rule, SpaceRule))

    def _choices(self, layer: LayerInfo, slot: str) -> tuple[Choice, ...]:
        chosen = getattr(self, slot)
        for rule in self._rules:
            if getattr(rule, slot) is not None and matches(rule.match, layer.name, layer.types):
                chosen = getattr(rule, slot)
        return (FLOAT,) if chosen is None else chosen

    def _units(
        self,
        layers: Sequence[LayerInfo],
        allowed: dict[tuple[str, str], tuple[Choice, ...]],
        ties: ResidualTies,
        faults: list[str],
    ) -> Iterable[Unit]:
        """Yields a unit for each tensor, or for each set of tied ones, in the model's order."""
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in layers:
            tied = [pattern for pattern in self._patterns if matches(pattern, layer.name, layer.types)]
            if len(tied) > 1:
                faults.append(f"{layer.name} is tied by {len(tied)} patterns: {', '.join(map(repr, tied))}")
            for slot in SLOTS:
                if (layer.name, slot) not in allowed:
                    continue
                residual = ties.group_of(layer.name, slot)
                if tied and residual:
                    faults.append(f"{layer.name}.{slot} is tied by the pattern {tied[0]!r} and by {RESIDUAL!r}")
                groups.setdefault((tied[0] if tied else residual or layer.name, slot), []).append(layer.name)
        for (name, slot), members in groups.items():
            shared = [c for c in allowed[members[0], slot] if all(c in allowed[member, slot] for member in members)]
            if not shared:
                faults.append(f"{name!r} ties {', '.join(members)}, whose {slot} choices have nothing in common")
            yield Unit(f"{name}.{slot}", slot, tuple(members), tuple(shared))


def _possible(
    layer: LayerInfo, slot: str, choices: Sequence[Choice], excluded: dict[str, list[str]]
) -> tuple[Choice, ...]:
    possible = []
    for choice in choices:
        try:
            rule: dict[str, Any] = {slot: choice}
            QuantPlan([Rule("*", **rule)]).resolve([layer])
            possible.append(choice)
        except PlanError as error:
            reasons = excluded.setdefault(f"{layer.name}.{slot}", [])
            if (reason := str(error).removeprefix(_PLAN_TITLE)) not in reasons:
                reasons.append(reason)
    return tuple(possible)


def _held(
    target: Target,
    layer: LayerInfo,
    slot: str,
    choices: Sequence[Choice],
    module: Any,
    excluded: dict[str, list[str]],
) -> tuple[Choice, ...]:
    """Returns the choices that files of a target can hold, on its own grid."""
    held: list[Choice] = []
    for choice in choices:
        own = target.own_spec(slot, choice) if isinstance(choice, QuantSpec) else choice
        reason = target.refusal(slot, own, module) if isinstance(own, QuantSpec) else None
        if reason is None:
            held.append(own)
        else:
            excluded.setdefault(f"{layer.name}.{slot}", []).append(f"'{own}' for {target.name}: {reason}")
    return tuple(dict.fromkeys(held))


def _parse_slots(target: Space | SpaceRule, title: str) -> None:
    faults = []
    for slot in SLOTS:
        if (value := getattr(target, slot)) is not None:
            try:
                object.__setattr__(target, slot, parse_choices(value))
            except QuantizationError as error:
                faults.append(f"{slot}: {error}")
    raise_all(SpecError, title, faults)


def _from_mapping(kind: Any, value: Mapping[str, Any]) -> Any:
    if not isinstance(value, Mapping):
        raise PlanError(f"a {kind.__name__} is written as a mapping, got {type(value).__name__}: {value!r}")
    faults = name_faults("key", value, [f.name for f in fields(kind)])
    if kind is SpaceRule and "match" not in value:
        faults.append(f"a rule without 'match': {dict(value)!r}")
    raise_all(PlanError, f"cannot read the {kind.__name__}", faults)
    return kind(**{str(key): item for key, item in value.items()})
