"""Plans for an export target: on its own grid, and refused before any work where its files cannot hold them."""

from __future__ import annotations

from typing import Any

from lq_plugin.errors import PlanError, did_you_mean, raise_all
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS, Target
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import QuantPlan, Rule
from lq_plugin.intent.spec import QuantSpec


def plan_for(plan: QuantPlan, target: str | None = None) -> QuantPlan:
    """Returns the plan with every spec on the grid of the target that it is for.

    Args:
        plan: of any model.
        target: name of an export target; None: the plan's own. A plan without one is returned unchanged.

    Raises:
        PlanError: there is no such target, or the plan names another one.

    >>> plan_for(QuantPlan.parse("w8a8"), "tensorrt").rules[0].input
    QuantSpec('int8 ema')
    """
    if target is not None and plan.target not in (None, target):
        raise PlanError(f"the plan is for the target {plan.target!r}, got target={target!r}")
    name = target or plan.target
    if name is None:
        return plan
    chosen = known_target(name)

    def own(rule: Rule) -> Rule:
        given = {slot: getattr(rule, slot) for slot in SLOTS}
        specs = {slot: chosen.own_spec(slot, x) if isinstance(x, QuantSpec) else x for slot, x in given.items()}
        return Rule(rule.match, **specs, start=rule.start)

    return QuantPlan(map(own, plan.rules), plan.schedule, name)


def known_target(name: Any) -> Target:
    """Returns the target of that name, one that writes no file included.

    Raises:
        PlanError: there is none.
    """
    if name not in TARGETS:
        near = did_you_mean(str(name).lower(), TARGETS)
        raise PlanError(f"there is no export target {name!r}; valid: {', '.join(TARGETS)}.{near}")
    return TARGETS[name]


def refuse_for_target(model: Any, plan: QuantPlan) -> None:
    """Refuses a prepared model that files of its plan's target cannot hold in the end, whatever its ranges will be.

    Args:
        model: prepared under the plan.
        plan: with or without a target.

    Raises:
        PlanError: naming every tensor, the reason, and the nearest spec that fits.
    """
    if plan.target is not None:
        faults = known_target(plan.target).faults(Request(model=model))
        raise_all(PlanError, f"target {plan.target!r} cannot hold {type(model).__name__} under its plan", faults)
