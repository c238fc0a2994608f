"""Rules of a plan that name operations which no layer owns, and the specs that each operation gets.

A rule is about operations when its pattern matches no layer and ends in an operation's name: `encoder.0.add_0`,
`*.matmul_*`, `type:hardswish`, `type:scaled_dot_product_attention`, `re:.*\\.(add|cat)_\\d+`. All other rules, `*`
among them, are about layers alone: an operation is never quantized unless it is asked for. So are the operations inside
of an LSTM or an attention, which need no recorded batch to be known: `lstm.cell_l0`, `attention.matmul_0`.
`type:product` asks for all products of activations, with the probabilities inside of torch's attention kernel;
`type:keys` and `type:values` for what a cache of that kernel keeps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lq_plugin.errors import PlanError, did_you_mean, raise_all
from lq_plugin.intent.plan import PRODUCT, LayerInfo, LayerPlan, QuantPlan, Rule, matches
from lq_plugin.intent.spec import PerChannel, QuantSpec
from lq_plugin.model.aside import names, quantizes, quantizing
from lq_plugin.model.graph.numbering import ATTENTION, CACHED, OPERATIONS, part_of
from lq_plugin.model.operations.quantized import (
    INNER_OPERATIONS,
    Operation,
    inner_operations,
    quantized_operations,
)
from lq_plugin.model.survey import Survey

_WORDS = OPERATIONS | INNER_OPERATIONS
_NAMED, _OUTSIDE = (
    re.compile(rf"(?:^|[.(|*?\]])(?:{'|'.join(sorted(words, key=len, reverse=True))})(?:_|[|)])")
    for words in (_WORDS, OPERATIONS)
)


def names_operation(pattern: str) -> bool:
    """Returns whether a pattern could match operations, by its form.

    >>> patterns = ("block.add_0", "*.matmul_*", "type:cat", "*", "block.add", "re:.*(add|cat)_0")
    >>> [names_operation(pattern) for pattern in patterns]
    [True, True, True, False, False, True]
    """
    return pattern[5:] in _WORDS | {PRODUCT} if pattern.startswith("type:") else _NAMED.search(pattern) is not None


def split(
    plan: QuantPlan, layers: Sequence[LayerInfo], aside: Iterable[str] = ()
) -> tuple[QuantPlan | None, list[Rule]]:
    """The plan of the rules about layers (None where there are none), and the rules about operations.

    A rule that keeps float what is no part of the model (the names `aside`) asks for nothing.

    Args:
        plan: with all rules.
        layers: the layers that can hold quantizers.
        aside: names of what is no part of the model.
    """
    chosen: list[Rule] = []
    others: list[Rule] = []
    for rule in plan.rules:
        found = _matches_any(rule, layers)
        if not found and not quantizes(rule) and any(names(rule.match, name) for name in aside):
            continue
        (chosen if names_operation(rule.match) and not found else others).append(rule)
    return (QuantPlan(others, plan.schedule, plan.target) if others else None), chosen


def blocked(plan: QuantPlan, layers: Sequence[LayerInfo], survey: Survey) -> dict[str, str]:
    """Modules that cannot hold quantizers although a rule matches them alone, and why; types near those of operations.

    Args:
        plan: with all rules.
        layers: the layers that can hold quantizers.
        survey: of the model.
    """
    # Nobody reads the reasons of more.
    idle = [rule for rule in plan.rules[:1000] if not _matches_any(rule, layers)]
    types = {kind for layer in layers for kind in layer.types}
    wrong = [rule.match for rule in idle if rule.match.startswith("type:") and not did_you_mean(rule.match[5:], types)]
    near = {match: did_you_mean(match[5:], _WORDS | {PRODUCT}) for match in wrong}
    return {match: f"operations have types also.{hint}" for match, hint in near.items() if hint} | {
        name: reason
        for name, reason in survey.reasons.items()
        if any(matches(r.match, name, [survey.kinds[name]]) for r in idle)
    }


def _matches_any(rule: Rule, layers: Iterable[LayerInfo]) -> bool:
    return any(matches(rule.match, layer.name, layer.types) for layer in layers)


def needs_recording(model: nn.Module, plan: QuantPlan) -> bool:
    """Returns whether `prepare` must be told the operations of `model`: the plan names some without quantizers.

    A rule that may name several is about those outside of LSTMs and attentions also, which only a recording shows.
    """
    if not any(names_operation(rule.match) for rule in plan.rules):
        return False
    survey = Survey.of(model, quantizing(plan))
    _, rules = split(plan, survey.infos(), survey.aside)
    prepared = [operation.operation for _, operation in quantized_operations(model)]
    present = _infos((*prepared, *inner_operations(model).values()))
    open_ = not prepared and any(_may_be_outside(rule.match) for rule in rules)
    return open_ or not all(_matches_any(rule, present) for rule in rules)


def _may_be_outside(pattern: str) -> bool:
    """Returns whether a pattern may match several operations, some of them in code of the user's.

    >>> [_may_be_outside(pattern) for pattern in ("type:product", "*.matmul_*", "lstm.cell_l0", "*.cell_*")]
    [True, True, False, False]
    """
    if pattern.startswith("type:"):
        return pattern[5:] not in INNER_OPERATIONS
    several = pattern.startswith("re:") or bool(set(pattern) & set("*?["))
    return several and _OUTSIDE.search(pattern) is not None


def resolve_operations(
    rules: Sequence[Rule], operations: Mapping[str, Operation], schedule: QuantPlan, known: bool
) -> dict[str, tuple[Operation, LayerPlan]]:
    """Returns the specs of each operation; operations that stay float are left out.

    Args:
        rules: those about operations.
        operations: of the model, by name.
        schedule: the plan that the rules are from.
        known: whether `operations` are all that a recorded pass has shown.

    Raises:
        PlanError: listing rules that match nothing, and what an operation cannot take.
    """
    if not rules:
        return {}
    infos = _infos(operations.values())
    faults = [
        _nothing_matches(rule, operations, known)
        for rule in rules
        # Of all products the first shown are not all.
        if not _matches_any(rule, infos) or (rule.match == f"type:{PRODUCT}" and not known)
    ]
    for rule in rules:
        given = [slot for slot in ("weight", "output") if getattr(rule, slot) is not None]
        faults += [
            f"{rule.match!r}: an operation has no {slot} to quantize, only its input: all of its operands"
            for slot in given
        ]
    raise_all(PlanError, "the plan does not fit the model", faults)
    plans = QuantPlan(rules, schedule.schedule).resolve(infos)
    for name, plan in plans.items():
        specs = [spec for _, spec in plan.stages_of("input") if spec is not None]
        faults += [
            f"{name}: input spec '{spec}' has a scale for each channel; the operands of an operation have one each"
            for spec in specs
            if isinstance(spec.granularity, PerChannel) and operations[name].op not in CACHED
        ]
        faults += [
            f"{name}: input spec '{spec}': {fault}"
            for spec in specs
            if operations[name].op in CACHED and (fault := _channels_fault(spec)) is not None
        ]
    faults += [
        f"{name} is float by a rule, and {attention} quantizes it as one of its operands: give it a spec of its own"
        for name, operation in operations.items()
        if operation.op in CACHED and not plans[name] and plans.get(attention := part_of(name, ATTENTION))
        and any(_matches_any(rule, _infos([operation])) for rule in rules)
    ]  # fmt: skip
    raise_all(PlanError, "the plan does not fit the model", faults)
    return {name: (_without_cached(operations[name], plans), plan) for name, plan in plans.items() if plan}


def _channels_fault(spec: QuantSpec) -> str | None:
    """Returns why keys and values cannot have these scales of channels."""
    if not isinstance(spec.granularity, PerChannel):
        return None
    if spec.granularity.axis is not None:
        return "channels are those of each head, write 'per_channel' without a number"
    if spec.dynamic:
        return "found at run time, a channel's scale would be that of all sequences of a batch: leave 'dynamic' away"
    return None


def _without_cached(operation: Operation, plans: Mapping[str, LayerPlan]) -> Operation:
    """Returns an attention without the operands that have specs of their own, as keys or values."""
    if operation.op != ATTENTION:
        return operation
    own = {place for part, place in CACHED.items() if plans.get(part_of(operation.name, part))}
    return replace(operation, operands=tuple(index for index in operation.operands if index not in own))


def _infos(operations: Iterable[Operation]) -> list[LayerInfo]:
    return [
        LayerInfo(o.name, (o.op, *([PRODUCT] if o.is_product else [])), slots=("input",), plain=False)
        for o in operations
    ]


def _nothing_matches(rule: Rule, operations: Mapping[str, Operation], known: bool) -> str:
    names = list(operations)
    shown = ", ".join(names[:6]) + (f", ... ({len(names)} operations)" if len(names) > 6 else "") if names else "none"
    near = did_you_mean(
        rule.match.removeprefix("type:"), {*names, *(operation.op for operation in operations.values())}
    )
    if not known:
        return (
            f"{rule.match!r} matches no layer, and operations are known from a recorded batch only: QAT and PTQ record "
            "one; by hand prepare(model, plan, lq_plugin.model.record(model, lambda: model(batch)))"
            + (f"; without one: {shown}.{near}" if names else "")
        )
    return f"{rule.match!r} matches no layer and no operation of the recorded batch; operations: {shown}.{near}"
