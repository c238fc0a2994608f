"""The schedule of switching on quantization and freezing observers: a pure function of epoch and step.

A `Moment` is written `"epoch 2"`, `"step 500"`, or as a plain int (steps). Nothing is remembered
between batches, so a resumed run is in the state the uninterrupted one would be in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from lq_plugin.errors import PlanError, is_integer, name_faults, raise_all
from lq_plugin.utilities.moved import former_names

__getattr__ = former_names(__name__)


@dataclass(frozen=True)
class Moment:
    """A point of a training run: `unit` is `"epoch"` or `"step"` (optimizer steps), counted from 0.

    >>> Moment.parse("epoch 2")
    Moment(unit='epoch', count=2)
    >>> str(Moment.parse(500))
    'step 500'
    """

    unit: str
    count: int

    @classmethod
    def parse(cls, value: Moment | str | int) -> Moment:
        """Reads `"epoch 2"`, `"step 500"` or an int (steps).

        Raises:
            PlanError: when it is none of these.
        """
        if isinstance(value, Moment):
            return value
        if is_integer(value, 0):
            return cls("step", value)
        if isinstance(value, str) and (match := re.fullmatch(r"(epoch|step)[ :]?(\d{1,15})", value.strip())):
            return cls(match[1], int(match[2]))
        raise PlanError(f"a moment is 'epoch N', 'step N' or a number of steps, got {value!r}")

    def reached(self, epoch: int, step: int) -> bool:
        """Returns True if a run at `epoch` (0-based) and optimizer step `step` has reached this moment."""
        return (epoch if self.unit == "epoch" else step) >= self.count

    def __str__(self) -> str:
        return f"{self.unit} {self.count}"


@dataclass(frozen=True)
class Switches:
    """Switches of all quantizers and batch norms at one moment of the run."""

    weights: bool
    activations: bool
    observe: bool
    freeze_batch_norm: bool


@dataclass(frozen=True)
class Schedule:
    """Moments of a quantized training run. Each takes `"epoch 2"`, `"step 500"` or None.

    Args:
        weights_start: weights are fake-quantized from here on; float before.
        activations_start: inputs and outputs likewise (observers watch from the first step).
        observer_freeze: activation ranges by EMA stop moving here; None: never.
        batch_norm_freeze: batch norm uses its running statistics from here on; None: never.

    >>> schedule = Schedule(activations_start="epoch 1", batch_norm_freeze="step 900")
    >>> schedule.at(epoch=0, step=10)
    Switches(weights=True, activations=False, observe=True, freeze_batch_norm=False)
    """

    weights_start: Moment | str | int = 0
    activations_start: Moment | str | int = 0
    observer_freeze: Moment | str | int | None = None
    batch_norm_freeze: Moment | str | int | None = None

    def __post_init__(self) -> None:
        faults = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.name.endswith("_freeze"):
                continue
            try:
                object.__setattr__(self, f.name, Moment.parse(value))
            except PlanError as error:
                faults.append(f"{f.name}: {error}")
        raise_all(PlanError, "impossible schedule", faults)

    def at(self, epoch: int, step: int) -> Switches:
        """Returns the switches at this epoch and optimizer step."""

        def reached(moment: Moment | str | int | None) -> bool:
            return isinstance(moment, Moment) and moment.reached(epoch, step)

        return Switches(
            weights=reached(self.weights_start),
            activations=reached(self.activations_start),
            observe=not reached(self.observer_freeze),
            freeze_batch_norm=reached(self.batch_norm_freeze),
        )

    @classmethod
    def parse(cls, value: Schedule | dict[str, Any] | None) -> Schedule:
        """Reads a schedule from a mapping; None is the default one."""
        if isinstance(value, Schedule):
            return value
        if value is None:
            return cls()
        if not isinstance(value, dict):
            raise PlanError(f"a schedule is a mapping of moments, got {type(value).__name__}: {value!r}")
        raise_all(PlanError, "cannot read the schedule", name_faults("key", value, [f.name for f in fields(cls)]))
        return cls(**value)

    def to_dict(self) -> dict[str, str]:
        """Returns the values that differ from the default, ready for YAML."""
        default = Schedule()
        return {
            f.name: str(getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        }
