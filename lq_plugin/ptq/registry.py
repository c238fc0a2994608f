"""The register of PTQ phases: their functions, options and order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lq_plugin.errors import PlanError, did_you_mean, raise_all
from lq_plugin.ptq.context import PhaseContext

PhaseFunction: TypeAlias = Callable[[PhaseContext], Any]


@dataclass(frozen=True)
class Phase:
    """One step of PTQ.

    Args:
        run: does it; what it returns is kept in the context's `results`.
        options: called with the options that a user gives (`{name: {...}}`), to refuse impossible ones at once; its
            parameters are the valid names. `run` finds the options in the context. None: the phase has no options.
        after, before: phases that it must follow or precede where both are used, each with the reason.
        without: phases that cannot be used together with it, each with the reason.
    """

    run: PhaseFunction
    options: Callable[..., Any] | None = None
    after: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)


#: By name; `register_phase` adds to it.
PHASES: dict[str, Phase] = {}


def register_phase(
    name: str,
    options: Callable[..., Any] | None = None,
    *,
    after: Mapping[str, str] | None = None,
    before: Mapping[str, str] | None = None,
    without: Mapping[str, str] | None = None,
) -> Callable[[PhaseFunction], PhaseFunction]:
    """Returns a decorator that makes a function of a `PhaseContext` a phase.

    It can then be named in `PTQ(phases=[...])`, in `run_phases` and in the phases of a search.

    Args:
        name: how users name the phase; a name that is taken is replaced.
        options, after, before, without: see `Phase`.

    >>> from lq_plugin.ptq import PHASES, register_phase
    >>> @register_phase("clamp_biases", after={"calibrate": "biases are compared with the ranges"})
    ... def clamp_biases(context):
    ...     for module in context.model.modules():
    ...         if getattr(module, "bias", None) is not None:
    ...             module.bias.data.clamp_(-1.0, 1.0)
    >>> PHASES.pop("clamp_biases").after
    {'calibrate': 'biases are compared with the ranges'}
    """

    def decorate(function: PhaseFunction) -> PhaseFunction:
        PHASES[name] = Phase(function, options, after or {}, before or {}, without or {})
        return function

    return decorate


def run_phase(context: PhaseContext, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Runs one phase; returns its result, which the context keeps also.

    Args:
        context: of the model.
        name: of the phase.
        options: of the phase, as checked by `check_phases`.
    """
    context.name, context.options = name, dict(options or {})
    context.results[name] = PHASES[name].run(context)
    return context.results[name]


def names_and_options(phases: Sequence[str | Mapping[str, Any]]) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Returns the names of the phases in their order, and the options of those written as `{name: {...}}`.

    Raises:
        PlanError: no list, an entry that is neither a name nor a mapping, or a mapping that does not have one key with
            a mapping of options.
    """
    if isinstance(phases, str | Mapping) or not isinstance(phases, Iterable):
        raise PlanError(f"phases are a list, got {phases!r}: write [{phases!r}]; valid: {', '.join(PHASES)}")
    names: list[str] = []
    options: dict[str, dict[str, Any]] = {}
    for phase in phases:
        if isinstance(phase, Mapping):
            if len(phase) != 1:
                raise PlanError(f"a phase with options is a mapping of its name to them, got {dict(phase)!r}")
            ((name, value),) = phase.items()
            if not isinstance(value, Mapping | None):
                raise PlanError(f"phase {name!r}: its options are a mapping of names to values, got {value!r}")
            options[str(name)] = {str(key): item for key, item in (value or {}).items()}
            names.append(str(name))
        elif isinstance(phase, str):
            names.append(phase)
        else:
            raise PlanError(
                f"a phase is a name or a mapping of its name to options, got {phase!r}; valid: {', '.join(PHASES)}"
            )
    return tuple(names), options


def check_phases(phases: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses unknown phases, impossible orders and options that a phase does not have.

    Args:
        phases: names in their order.
        options: by name of the phase.

    Raises:
        PlanError: naming every fault.
    """
    unknown = [phase for phase in phases if phase not in PHASES]
    if unknown or not phases:
        raise PlanError(
            f"unknown phases {unknown}; valid: {', '.join(PHASES)}.{did_you_mean(str((unknown or [''])[0]), PHASES)}"
        )
    faults = [] if "calibrate" in phases else ["they lack 'calibrate': without it there are no ranges"]
    faults += [f"{name} is named twice" for name in dict.fromkeys(phases) if phases.count(name) > 1]
    for name in dict.fromkeys(phases):
        mine, phase = phases.index(name), PHASES[name]
        faults += [
            f"put {name} after {other}: {why}" for other, why in phase.after.items() if other in phases[mine + 1 :]
        ]
        faults += [f"put {name} before {other}: {why}" for other, why in phase.before.items() if other in phases[:mine]]
        faults += [f"use {name} or {other}, not both: {why}" for other, why in phase.without.items() if other in phases]
    raise_all(PlanError, f"phases {list(phases)}", faults)
    for name, given in options.items():
        checker = PHASES[name].options
        if checker is None:
            raise PlanError(f"phase {name!r} has no options, got {dict(given)}")
        valid = list(inspect.signature(checker).parameters)
        unknown = [option for option in given if option not in valid]
        if unknown:
            near = did_you_mean(unknown[0], valid)
            raise PlanError(
                f"phase {name!r} has no options {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}.{near}"
            )
        try:
            checker(**given)
        except (TypeError, ValueError) as error:
            raise PlanError(f"phase {name!r}: {error}") from error
