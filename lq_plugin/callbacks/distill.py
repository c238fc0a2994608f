"""Distillation from the float copy: the quantized model also learns to answer as the float one did.

    loss = (1 - weight) · own loss + weight · T² · KL(softmax(teacher / T) ‖ softmax(student / T))

Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531);
for quantized students: Mishra, Marr, "Apprentice", ICLR 2018 (arXiv 1711.05852).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lq_plugin.callbacks.trainer.steps import step_runner
from lq_plugin.callbacks.trainer.traces import silenced
from lq_plugin.errors import PlanError, raise_all
from lq_plugin.model.copies import copy_model
from lq_plugin.model.kept_state import KeptState
from lq_plugin.model.prepare import remove
from lq_plugin.utilities import hooks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@dataclass(frozen=True)
class Distillation:
    """The settings of learning from the float copy.

    Args:
        weight: share of the distillation loss, 0..1; the module's own loss has the rest.
        temperature: T; larger ones compare the small probabilities also.
        output: name of the submodule whose output is the logits; None: the last one that the step calls directly.
        class_dim: dim of the classes in the logits.
    """

    weight: float = 0.5
    temperature: float = 4.0
    output: str | None = None
    class_dim: int = -1

    def __post_init__(self) -> None:
        faults = []
        if not 0.0 < self.weight <= 1.0:
            faults.append(f"weight is a share in 0..1, got {self.weight!r}")
        if not self.temperature > 0.0:
            faults.append(f"temperature must be positive, got {self.temperature!r}")
        raise_all(PlanError, "impossible distillation", faults)

    @classmethod
    def parse(cls, value: Distillation | Mapping[str, Any] | float | None) -> Distillation | None:
        """Returns the settings from a mapping of their fields, or from the weight alone.

        >>> Distillation.parse(0.7)
        Distillation(weight=0.7, temperature=4.0, output=None, class_dim=-1)
        """
        if value is None or isinstance(value, Distillation):
            return value
        names = list(cls.__dataclass_fields__)
        if isinstance(value, Mapping) and set(value) <= set(names):
            return cls(**value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(float(value))
        raise PlanError(f"distill is a share in 0..1 or a mapping of {', '.join(names)}; got {value!r}")

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T² · KL(teacher ‖ student), the mean over everything but the classes.

        Args:
            student, teacher: logits of one shape.
        """
        log_p, log_q = (
            F.log_softmax(logits.float() / self.temperature, self.class_dim) for logits in (teacher, student)
        )
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(self.class_dim).mean()


class Teacher:
    """The float copy of a module, and the way its answers enter the training step.

    Args:
        distillation: what is wanted.
        pl_module: prepared; its weights are those of the float model.
        calibration_step: runs the module on a batch, as in a calibration.
        state: of the teacher of the run that is resumed.
    """

    def __init__(
        self,
        distillation: Distillation,
        trainer: Trainer,
        pl_module: LightningModule,
        calibration_step: Callable[[LightningModule, Any], Any] | None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not pl_module.automatic_optimization:
            raise PlanError(
                f"{type(pl_module).__name__} optimizes by hand: distillation adds to the loss its training step returns"
            )
        self.distillation = distillation
        self.module = _float_copy(pl_module)
        if state is not None:
            self.module.load_state_dict(state)
        self.module._trainer = trainer
        self.step = step_runner(trainer, self.module, calibration_step)
        # Its own, so that what its steps keep does not grow with the batches.
        self.before = KeptState(self.module)
        self.output = distillation.output
        if self.output is not None and self.output not in dict(pl_module.named_modules()):
            raise PlanError(f"distill: {type(pl_module).__name__} has no submodule {self.output!r}")

    def attach(self, pl_module: LightningModule) -> None:
        """Adds the distillation loss to what `training_step` returns."""
        original = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            batch = args[0] if args else next(iter(kwargs.values()))
            teacher = self.answers(batch)
            with _outputs(pl_module, self.output) as student:
                result = original(*args, **kwargs)
            if result is None:
                return None
            if [logits.shape for logits in student] != [logits.shape for logits in teacher]:
                raise PlanError(
                    f"distill: {self.output or 'the module'} gives {[tuple(s.shape) for s in student]} in the training "
                    "step and "
                    f"{[tuple(t.shape) for t in teacher]} in the step of the float copy; name the logits with "
                    "output=..., "
                    "or give calibration_step=..."
                )
            distance = torch.stack([self.distillation.loss(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
            pl_module.log("quant/distillation", distance.detach())
            share = self.distillation.weight
            if isinstance(result, Mapping):
                return {**result, "loss": (1 - share) * result["loss"] + share * distance}
            return (1 - share) * result + share * distance

        pl_module.__dict__["training_step"] = hooks.StandIn(original, training_step)

    @staticmethod
    def detach(pl_module: LightningModule) -> None:
        """Gives the module its own training step back."""
        pl_module.__dict__.pop("training_step", None)

    def answers(self, batch: Any) -> list[Tensor]:
        """Returns the float model's logits for a batch, one for each call."""
        if self.output is None:
            self.output = self._find_output(batch)
        with _outputs(self.module, self.output) as logits:
            self.run(batch)
        return logits

    def run(self, batch: Any) -> None:
        """Runs the step of the float model; it leaves no trace, not even in the float model."""
        try:
            with torch.no_grad(), silenced(self.module):
                self.step(batch)
        finally:
            self.before.restore()

    def _find_output(self, batch: Any) -> str:
        """Returns the last module with parameters that the step calls itself, not from within another one."""
        called: list[str] = []
        depth = 0

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                nonlocal depth
                if not depth:
                    called.append(name)
                depth += 1

            return hook

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1

        chosen = [
            (n, m)
            for n, m in self.module.named_modules()
            if not isinstance(m, Metric) and any(True for _ in m.parameters())
        ]
        handles = [hooks.before(m, enter(n)) for n, m in chosen] + [hooks.after(m, leave) for _, m in chosen]
        try:
            self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        if not called:
            raise PlanError(
                "distill: the step of the float copy calls no module with parameters; name the logits with output=..."
            )
        return called[-1]


@contextmanager
def _outputs(module: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """Collects the outputs of the submodule in the calls inside."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise PlanError(
                f"distill: the output of {name or 'the module'} is no tensor of logits but {type(output).__name__}; "
                "give output=..."
            )
        found.append(logits)

    handle = hooks.after(module.get_submodule(name or ""), hook)
    try:
        yield found
    finally:
        handle.remove()


def _float_copy(pl_module: LightningModule) -> LightningModule:
    """Returns a copy of the module without quantizers, in evaluation mode, without gradients."""
    teacher = copy_model(pl_module)
    remove(teacher)
    return teacher.eval().requires_grad_(False)
