"""Contract between an export target and those who ask it for a file. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Option:
    """One option of a target: `lq-export NAME=...` and `Export(..., NAME=...)`.

    Args:
        name: the word for it.
        default: its value when nothing is given.
        fault: says what is wrong with a value; None: nothing.
    """

    name: str
    default: Any
    fault: Callable[[Any], str | None]

    def is_default(self, value: Any) -> bool:
        """Returns True where a value asks for nothing else than the default: `[]` where that is `()`."""
        return value == self.default or not (value or self.default)


@dataclass(frozen=True)
class Request:
    """Request to a target, as far as it is known: each step of a run knows more.

    Args:
        options: values by name.
        path: of the file; None: not known yet.
        model: prepared; None: not built yet.
        settled: of the model: its "plan" (weights may still change), its "weights", or its "ranges", with which it can
            be written.
        inputs: positional arguments of the model's forward, as an example; None: not known yet.
        batches: calibration batches, each like `inputs` or its only tensor; None: not asked for, or not known yet.
        from_loader: the inputs are the first tensor of each batch of a loader.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    model: Any = None
    settled: Literal["plan", "weights", "ranges"] = "plan"
    inputs: Sequence[Any] | None = None
    batches: Sequence[Any] | None = None
    from_loader: bool = False


def option_faults(options: Sequence[Option], given: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the given values of a target's options."""
    found = [option.fault(given[option.name]) for option in options if option.name in given]
    return [fault for fault in found if fault is not None]


def flag_fault(name: str) -> Callable[[Any], str | None]:
    """Returns the check of an option that is true or false."""
    return lambda value: None if isinstance(value, bool) else f"{name} is true or false, got {value!r}"
