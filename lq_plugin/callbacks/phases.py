"""PTQ phases in a Trainer: its batches, steps, processes and progress bar as a `PhaseContext`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from rich.progress import Progress, TaskID

from lq_plugin.callbacks.trainer.data import calibration_batches, one_batch, statistics_merger, with_progress
from lq_plugin.callbacks.trainer.sharding import resharded, whole_weights
from lq_plugin.callbacks.trainer.steps import CalibrationStep, step_runner
from lq_plugin.callbacks.trainer.traces import without_traces
from lq_plugin.errors import PlanError
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.graph.record import Recording, record
from lq_plugin.model.ledger import Ledger
from lq_plugin.ptq import phases
from lq_plugin.ptq.phases import PHASES as PHASES, PhaseContext
from lq_plugin.utilities.lightning_packages import isolate_rng

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class TrainerContext(PhaseContext):
    """A LightningModule in a running Trainer, as phases see it.

    Args:
        trainer, pl_module: of the run; quantizers are in the module.
        dataloader: calibration data; the datamodule's or the module's train dataloader when None.
        calibration_batches: how many batches each rank reads.
        calibration_step: runs the module on a batch; its own step when None.
        ledger: of the module.
        title: put before messages.
    """

    model: LightningModule

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        dataloader: Iterable[Any] | None = None,
        calibration_batches: int = 8,
        calibration_step: CalibrationStep | None = None,
        *,
        ledger: Ledger | None = None,
        title: str = "PTQ",
    ) -> None:
        super().__init__(pl_module, ledger=ledger)
        self.trainer, self.dataloader, self.count = trainer, dataloader, calibration_batches
        self.calibration_step, self.title = calibration_step, title
        self.merge = statistics_merger(trainer)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    @property
    def batches(self) -> Iterable[Any]:
        return _Batches(self._read)

    @property
    def batches_if_any(self) -> Iterable[Any]:
        return _Batches(lambda: self._read(needed=False))

    def _read(self, needed: bool = True) -> Iterator[Any]:
        batches = calibration_batches(self.trainer, self.model, self.dataloader, self.count, needed)
        return with_progress(self.trainer, self.name, batches, self.count)

    def run(self, batch: Any) -> Any:
        with self.passes():
            return self._step(batch)

    @cached_property
    def _step(self) -> Callable[[Any], Any]:
        return step_runner(self.trainer, self.model, self.calibration_step)

    @contextmanager
    def passes(self) -> Iterator[None]:
        if self._progress is not None:  # one is open
            yield
            return
        shown = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
        self._progress = Progress(disable=not shown, transient=True)
        try:
            with resharded(self.model), without_traces(self.model):
                yield
        finally:
            if self._tasks:
                self._progress.stop()
            self._progress, self._tasks = None, {}

    def record(self) -> Recording:
        trainer, module = self.trainer, self.model
        with (
            resharded(module), without_traces(module), evaluating(module), float_forward(module), torch.no_grad(),
            isolate_rng(),
        ):  # fmt: skip
            run, samples = one_batch(trainer, module, self.dataloader, self.calibration_step)
            return record(module, run, samples=samples)

    def whole_weights(self) -> AbstractContextManager[None]:
        return whole_weights(self.model)

    def say(self, message: str) -> None:
        rank_zero_info(f"{self.title}: {message}")

    def warn(self, message: str) -> None:
        rank_zero_warn(f"{self.title}: {message}")

    def show(self, title: str, done: int, total: int) -> None:
        if self._progress is None:
            return
        if not self._tasks:
            self._progress.start()  # not before: reading batches shows a bar of its own
        if title not in self._tasks:
            self._tasks[title] = self._progress.add_task(title, total=total)
        self._progress.update(self._tasks[title], completed=done)


class _Batches(Iterable[Any]):
    """Batches that are read anew each time they are iterated."""

    def __init__(self, read: Callable[[], Iterator[Any]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        return self._read()


def register_phase(
    name: str, options: Callable[..., Any] | None = None, **order: Mapping[str, str] | None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns the decorator of `lq_plugin.ptq.register_phase`, which also takes the former kind of function.

    That is one of `(ptq, trainer, pl_module)`: it works in a Trainer only, and is deprecated.

    Args:
        name, options: see `lq_plugin.ptq.register_phase`.
        order: its `after`, `before` and `without`.
    """
    register = phases.register_phase(name, options, **order)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        register(_of_context(name, function) if len(inspect.signature(function).parameters) == 3 else function)
        return function

    return decorate


def _of_context(name: str, function: Callable[..., Any]) -> Callable[[PhaseContext], Any]:
    """Returns a phase that calls a function of `(ptq, trainer, pl_module)`."""
    warnings.warn(
        f"phase {name!r}: functions of (ptq, trainer, pl_module) are deprecated, write one of a PhaseContext "
        "(lq_plugin.ptq.register_phase)",
        DeprecationWarning,
        stacklevel=3,
    )

    @wraps(function)
    def phase(context: PhaseContext) -> Any:
        owner = getattr(context, "callback", None)
        if not isinstance(context, TrainerContext) or owner is None:
            raise PlanError(
                f"phase {name!r} is a function of (ptq, trainer, pl_module), which PTQ alone can call; here it must be "
                "one of a PhaseContext"
            )
        return function(owner, context.trainer, context.model)

    return phase
