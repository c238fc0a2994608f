"""`QuantPlan`, the quantization of a whole model: ordered rules from layer patterns to specs.

The same plan as a short string, as YAML, and in Python::

    w4a8                                    rules:                       QuantPlan([
    w4 group16 mse a8 percentile:99.9         - match: "*"                 Rule("*", weight="int4 per_channel",
    int4 per_channel mse / uint8 affine         weight: int4 per_channel            input="uint8 affine ema"),
                                                input: uint8 affine ema    Rule("type:Linear", input="float")])
                                              - match: type:Linear
                                                input: float

A short string is about layers. With the word `products` (`w8a8 products`) it is also about the products of activations
that no layer owns, those of an attention above all: `Rule("type:product", input=...)` with the spec of inputs.

Later rules win, each field on its own: a rule that says nothing of `weight` leaves it as it was.
A pattern is a layer's name, a glob over names (`layer1.*`), a regular expression after `re:`
(`lq_plugin.intent.name_pattern`), or a class name after `type:`. A plan is data: reading one never instantiates or
executes anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import translate
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table
from rich.text import Text

from lq_plugin.errors import SHOWN_FAULTS, PlanError, QuantizationError, SpecError, did_you_mean, name_faults, raise_all
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.layer_plan import LayerInfo, LayerPlan, Stage, for_layer, layer_faults, layer_plan
from lq_plugin.intent.name_pattern import name_pattern
from lq_plugin.intent.plain_yaml import plain_yaml_text, read_plain_yaml
from lq_plugin.intent.schedule import Moment, Schedule
from lq_plugin.intent.short_plan import is_short, read_short
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.utilities.files import write_file
from lq_plugin.utilities.shown import Shown, new_table

__all__ = ["FLOAT", "LayerInfo", "LayerPlan", "QuantPlan", "Rule", "Stage", "matches"]

#: In a rule: leave this tensor float, whatever earlier rules said.
FLOAT = "float"
#: In `type:product`: every product of activations, which no layer owns: those of an attention, of `torch.bmm`, ...
PRODUCT = "product"
#: In a short plan: these products have the spec of inputs.
_PRODUCTS = "products"
SpecOrFloat: TypeAlias = "QuantSpec | str | None"
#: Of a plan as a mapping.
_KEYS = ("rules", "schedule", "target")


@dataclass(frozen=True)
class Rule:
    """A set of layers, and how their tensors are quantized.

    Args:
        match: name, glob, `re:regex` or `type:ClassName`.
        weight, input, output: a spec (or its string), `"float"`, or None to leave it as earlier rules say.
        start: the moment of a training run from which the rule holds (`"epoch 2"`, `"step 500"`); None: always.
            `Rule("*", weight="int8"), Rule("*", weight="int4", start="epoch 2")` lowers the precision on the way.
    """

    match: str
    weight: SpecOrFloat = None
    input: SpecOrFloat = None
    output: SpecOrFloat = None
    start: Moment | str | int | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.start is not None:
            try:
                object.__setattr__(self, "start", Moment.parse(self.start))
            except PlanError as error:
                faults.append(f"start: {error}")
        if not isinstance(self.match, str) or not self.match.strip():
            faults.append(f"match must be a name, a glob, 're:...' or 'type:...', got {self.match!r}")
        elif self.match.startswith("re:"):
            try:
                name_pattern(self.match[3:])
            except PlanError as error:
                faults.append(f"re: {error}")
        for slot in SLOTS:
            value = getattr(self, slot)
            if value is None or value == FLOAT:
                continue
            try:
                object.__setattr__(self, slot, _spec(value) if isinstance(value, str) else QuantSpec.parse(value))
            except SpecError as error:
                faults.append(f"{slot}: {error}")
        raise_all(PlanError, f"rule {self.match!r}", faults)

    def to_dict(self) -> dict[str, str]:
        """Returns plain strings, ready for YAML."""
        return {key: str(value) for key in ("match", *SLOTS, "start") if (value := getattr(self, key)) is not None}


@dataclass(frozen=True)
class QuantPlan(Shown):
    """Ordered rules and a schedule: all that search proposes, callbacks apply and exports read; prints as a table.

    Args:
        rules: in order; later ones win.
        schedule: moments of a training run.
        target: name of the export target that the plan is for (`lq_plugin.export.target`). Callbacks, commands and
            searches refuse what its files cannot hold before they begin, and quantize on its own grid. None: none yet.

    >>> QuantPlan.parse("w4a8").rules[0]
    Rule(match='*', weight=QuantSpec('int4 per_channel'), input=QuantSpec('uint8 affine ema'), output=None, start=None)
    """

    rules: tuple[Rule, ...]
    schedule: Schedule = field(default_factory=Schedule)
    target: str | None = None

    def __init__(
        self,
        rules: Iterable[Rule],
        schedule: Schedule | Mapping[str, Any] | None = None,
        target: str | None = None,
    ) -> None:
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "target", target)
        object.__setattr__(
            self, "schedule", Schedule.parse(schedule if not isinstance(schedule, Mapping) else dict(schedule))
        )
        if not self.rules:
            raise PlanError(
                "a plan needs at least one rule, got none; a plan that keeps all float is [Rule('*', weight='float')]"
            )
        wrong = [repr(rule) for rule in self.rules if not isinstance(rule, Rule)]
        raise_all(PlanError, "a plan is made of Rules", [f"got {text}" for text in wrong])
        if target is not None and not (isinstance(target, str) and target):
            raise PlanError(f"target is the name of an export target, such as 'onnx', got {target!r}")

    @classmethod
    def parse(cls, value: QuantPlan | str | Path | Mapping[str, Any]) -> QuantPlan:
        """Reads a plan from its short string, a path to a YAML file, a mapping, or a plan.

        Raises:
            PlanError: listing everything that is wrong in it.

        >>> QuantPlan.parse("w4 group16 mse a8 percentile:99.9").rules[0].weight
        QuantSpec('int4 group16 mse')
        """
        if isinstance(value, QuantPlan):
            return value
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
            return cls.from_yaml(Path(value))
        if isinstance(value, str):
            return cls._from_short(value)
        if isinstance(value, Mapping):
            return cls.from_dict(_plain(value))
        raise PlanError(
            f"a plan is a short string, a YAML path, a mapping or a QuantPlan, got {type(value).__name__}: {value!r}"
        )

    @classmethod
    def _from_short(cls, text: str) -> QuantPlan:
        try:
            words = [word for word in text.split() if word != _PRODUCTS]
            multiplies, short = len(words) < len(text.split()), " ".join(words)
            if "/" in short:
                weight, _, rest = short.partition("/")
                rule = Rule("*", weight=_spec_or_float(weight), input=_spec_or_float(rest))
            else:
                rule = Rule("*", **read_short(short)) if is_short(short) else Rule("*", weight=QuantSpec.parse(short))
            return cls([rule, *([_products(rule)] if multiplies else [])])
        except QuantizationError as error:
            hint = (
                "write 'w4a8', 'w4 group16 mse a8 percentile:99.9', 'int4 per_channel / uint8 affine', "
                "or a path ending in .yaml"
            )
            raise PlanError(f"cannot read the plan {text!r}: {error}\n  {hint}") from None

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> QuantPlan:
        """Builds a plan from `{"rules": [{"match": ..., "weight": ...}], "schedule": {...}, "target": ...}`."""
        if not isinstance(mapping, Mapping):
            raise PlanError(f"a plan is a mapping with 'rules', got {type(mapping).__name__}: {mapping!r}")
        faults = name_faults("key", mapping, _KEYS)
        raw = mapping.get("rules")
        rules: list[Rule] = []
        names = [f.name for f in fields(Rule)]
        if isinstance(raw, str) or not isinstance(raw, Sequence):
            faults.append(f"rules must be a list of mappings, got {raw!r}")
            raw = []
        for index, entry in enumerate(raw):
            if not isinstance(entry, Mapping):
                faults.append(f"rule {index} must be a mapping like {{match: '*', weight: int4}}, got {entry!r}")
                continue
            unknown = name_faults("key", entry, names)
            faults += [f"rule {index}: {fault}" for fault in unknown]
            if "match" not in entry:
                faults.append(f"rule {index} has no 'match'")
            elif not unknown:
                try:
                    rules.append(Rule(**entry))
                except QuantizationError as error:
                    faults.append(f"rule {index}: {error}")
        schedule = None
        try:
            schedule = Schedule.parse(mapping.get("schedule"))
        except QuantizationError as error:
            faults.append(str(error))
        raise_all(PlanError, "cannot read the plan", faults)
        return cls(rules, schedule, mapping.get("target"))

    @classmethod
    def from_yaml(cls, path: str | Path) -> QuantPlan:
        """Reads a plan file. Only plain YAML is accepted: tags that build objects are refused."""
        path = Path(path)
        content = read_plain_yaml(path)
        if not isinstance(content, dict):
            raise PlanError(f"{path}: a plan file holds a mapping with 'rules', got {type(content).__name__}")
        try:
            return cls.from_dict(content)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain lists, mappings and strings, which `QuantPlan.from_dict` reads back equal."""
        content: dict[str, Any] = {"rules": [rule.to_dict() for rule in self.rules]}
        if schedule := self.schedule.to_dict():
            content["schedule"] = schedule
        if self.target is not None:
            content["target"] = self.target
        return content

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Returns the plan as YAML text, and writes it to `path` if one is given."""
        text = plain_yaml_text(self.to_dict())
        if path is not None:
            write_file(path, text, PlanError)
        return text

    def table(self) -> Table:
        """Returns the rules as a table, in order; an empty cell leaves a tensor as earlier rules say."""
        extras = [f"for target {self.target}"] * (self.target is not None)
        extras += [f"{name} {moment}" for name, moment in self.schedule.to_dict().items()]
        table = new_table("; ".join([f"plan of {len(self.rules)} rule{'s' * (len(self.rules) != 1)}", *extras]))
        used = [key for key in (*SLOTS, "start") if any(getattr(rule, key) is not None for rule in self.rules)]
        for column in ("match", *used):
            table.add_column(column, overflow="fold")
        for rule in self.rules:
            texts = rule.to_dict()
            # Text, not str: brackets in a pattern are no markup.
            table.add_row(*(Text(texts.get(column, "")) for column in ("match", *used)))
        return table

    def describe(self, model: Any) -> Any:
        """Returns the effect of the plan on a model, layer by layer, without changing the model; it prints as a table.

        Args:
            model: an `nn.Module`, float.

        Returns:
            `lq_plugin.report.explain.Explanation`; that module's `explain` also takes a run of the model, for MACs and
            BOPs.

        Raises:
            PlanError: a plan that does not fit the model.
        """
        # By name: the one word of a plan that needs torch and a model. Nothing else of this room does.
        return import_module("lq_plugin.report.explain").explain(self, model)

    def resolve(self, layers: Sequence[LayerInfo], others: Mapping[str, str] | None = None) -> dict[str, LayerPlan]:
        """Returns the plan of each of a model's layers.

        Args:
            layers: the layers that can hold quantizers.
            others: names and types of all other modules, for error messages.

        Returns:
            One `LayerPlan` for each layer, in the model's order.

        Raises:
            PlanError: listing each pattern that matches nothing, with near names, and each spec that a layer cannot
                take.
        """
        chosen: dict[str, dict[str, list[Stage]]] = {layer.name: {} for layer in layers}
        faults: list[str] = []
        for rule in self.rules:
            match = _matcher(rule.match)
            hits = [layer for layer in layers if match(layer.name, layer.types)]
            if not hits:
                # Near names take time; nobody reads them for the thousandth rule.
                few = len(faults) < SHOWN_FAULTS
                faults.append(
                    _nothing_matches(rule.match, layers, others or {}) if few else f"{rule.match!r} matches no layer"
                )
            for layer in hits:
                for slot in layer.slots:
                    if (value := getattr(rule, slot)) is not None:
                        spec = for_layer(layer, slot, value) if isinstance(value, QuantSpec) else None
                        stage = Stage(slot, rule.start, spec)  # type: ignore[arg-type]
                        # A rule that always holds makes all before it meaningless.
                        before = chosen[layer.name].get(slot, [Stage(slot, None, None)]) if rule.start else []
                        chosen[layer.name][slot] = [*before, stage]
        plans = {name: layer_plan(name, stages, faults) for name, stages in chosen.items()}
        for layer in layers:
            faults += layer_faults(layer, plans[layer.name])
        raise_all(PlanError, "the plan does not fit the model", faults)
        return plans


def matches(pattern: str, name: str, types: Sequence[str]) -> bool:
    """Returns True if a rule's pattern matches a layer.

    Args:
        pattern: as in `Rule.match`.
        name: of the layer.
        types: class names of the layer, for `type:` patterns.

    >>> matches("layer1.*", "layer1.0.conv1", ["Conv2d"]), matches("type:Linear", "fc", ["QuantLinear", "Linear"])
    (True, True)
    """
    return _matcher(pattern)(name, types)


def _matcher(pattern: str) -> Callable[[str, Sequence[str]], bool]:
    """Returns `matches` for one pattern and many layers."""
    if pattern.startswith("type:"):
        return lambda _, types: pattern[5:] in types
    if not pattern.startswith("re:") and not set(pattern) & set("*?["):
        return lambda name, _: name == pattern
    if pattern.startswith("re:"):
        fits = name_pattern(pattern[3:])
        return lambda name, _: fits(name)
    expression = re.compile(translate(pattern))  # stars of a glob do not backtrack
    return lambda name, _: expression.fullmatch(name) is not None


def _nothing_matches(pattern: str, layers: Sequence[LayerInfo], others: Mapping[str, str]) -> str:
    blocked = [f"{name} ({kind})" for name, kind in others.items() if matches(pattern, name, [kind])]
    if blocked:
        inside = [layer.name for layer in layers if layer.name.startswith(pattern + ".")]
        hint = f" Did you mean '{pattern}.*'?" if inside else ""
        return f"{pattern!r} matches no layer that can be quantized, only {', '.join(blocked[:3])}.{hint}"
    if pattern.startswith("type:"):
        valid = sorted({kind for layer in layers for kind in layer.types[:2]})
        return (
            f"{pattern!r} matches no layer; types in the model: {', '.join(valid)}.{did_you_mean(pattern[5:], valid)}"
        )
    valid = [layer.name for layer in layers]
    shown = ", ".join(valid[:6]) + (f", ... ({len(valid)} layers)" if len(valid) > 6 else "")
    return f"{pattern!r} matches no layer; layers: {shown}.{did_you_mean(pattern, valid)}"


@lru_cache(maxsize=1024)
def _spec(text: str) -> QuantSpec:
    return QuantSpec.parse(text)  # a thousand rules name few specs


def _spec_or_float(text: str) -> SpecOrFloat:
    return FLOAT if text.strip() in ("", FLOAT) else QuantSpec.parse(text.strip())


def _products(rule: Rule) -> Rule:
    """Returns the rule that a short plan's word `products` stands for, next to its rule of all layers."""
    spec = rule.input
    if not isinstance(spec, QuantSpec):
        raise PlanError(f"{_PRODUCTS!r} are quantized as inputs are: write 'w8a8 {_PRODUCTS}'")
    if spec.lacks_a_side:
        raise PlanError(f"{_PRODUCTS!r} have negative operands, which '{spec}' cannot hold: make inputs affine")
    return Rule(f"type:{PRODUCT}", input=spec)


def _plain(value: Any) -> Any:
    """Returns mappings and sequences of any kind (those of OmegaConf, for instance) as dict and list."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
