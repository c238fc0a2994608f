"""One trial of a sweep, inside its Hydra job, in the process in which a launcher runs it.

A training script needs nothing of this: what its task function returns is the trial's value. One that wants to be
pruned, and has no `TrialReport` among its callbacks, says::

    from lq_plugin.search.sweep.job import current_trial

    if (trial := current_trial()) is not None:
        trial.report(accuracy, step=epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from hydra.core.hydra_config import HydraConfig
from optuna import Study, Trial, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from lq_plugin.errors import QuantizationError, did_you_mean, raise_all
from lq_plugin.search.shared.build import build
from lq_plugin.search.shared.database import SharedStorage, StudyError, has_heartbeat, quiet, rdb_storage
from lq_plugin.search.shared.dominance import REPORTS, with_report
from lq_plugin.search.shared.others import TAKEN_FOR_DEAD
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.search.study.objective import ERROR, METRICS
from lq_plugin.utilities.hydra_files import hide_passwords
from lq_plugin.utilities.passwords import passwords_in

log = logging.getLogger(__name__)

#: User attribute of a failed trial that was stopped from outside, and is tried again.
INTERRUPTED = "interrupted"


class TrialFailure(RuntimeError):
    """The error of a failed job: its traceback as text, which survives every launcher and holds no model in memory."""


@dataclass(frozen=True)
class StudyAccess:
    """The settings by which a job finds its trial.

    Args:
        name: of the study.
        storage: a URL, or the config of a storage.
        heartbeat: seconds between signs of life.
        pruner: the config of a pruner, or None.
        objectives: their number.
        costs: the last of the objectives, which `JobTrial.note` knows.
        constraints: what a trial must keep.
    """

    name: str
    storage: Any
    heartbeat: int
    pruner: Any = None
    objectives: int = 1
    costs: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    def open(self) -> Study:
        """Returns the study, with its pruner."""
        with quiet():
            pruner = NopPruner() if self.pruner is None else build(self.pruner, BasePruner, "hydra.sweeper.pruner")
            storage = (
                _connected(self.storage, self.heartbeat, os.getpid())
                if isinstance(self.storage, str)
                else SharedStorage.of(build(self.storage, BaseStorage, "hydra.sweeper.storage"))
            )
            # A job samples nothing.
            return optuna.load_study(study_name=self.name, storage=storage, sampler=RandomSampler(), pruner=pruner)


@functools.lru_cache(maxsize=1)
def _connected(url: str, heartbeat: int, process: int) -> BaseStorage:
    """Returns a storage that the jobs of one process share: opening one takes longer than a trial's transactions."""
    return rdb_storage(url, heartbeat)


class JobTrial:
    """The trial that this job evaluates.

    Args:
        study: shared.
        number: of the trial, and of the job.
        access: objectives, costs and constraints.
    """

    def __init__(self, study: Study, number: int, access: StudyAccess) -> None:
        self.study, self.number, self.access = study, number, access
        frozen = study.get_trials(deepcopy=False)[number]
        if frozen.state != TrialState.RUNNING:
            raise StudyError(
                f"trial {number} is {frozen.state.name}: this job was taken for dead, and another one has its "
                "parameters"
            )
        self._id = frozen._trial_id
        self._trial = Trial(study, self._id)
        self.metrics: dict[str, float] = {}

    @property
    def params(self) -> dict[str, Any]:
        """Values of the sweep's parameters."""
        return dict(self._trial.params)

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keeps these values with the trial; later ones of the same name replace them."""
        self.metrics |= {name: float(value) for name, value in metrics.items()}

    def require(self, costs: Mapping[str, float]) -> None:
        """Notes costs that are known before anything is trained.

        Raises:
            TrialPruned: it breaks a constraint.
        """
        self.note(costs)
        broken = [str(limit) for limit in self.access.constraints if limit.name in costs and limit.violation(costs) > 0]
        if broken:
            raise TrialPruned(f"breaks {', '.join(broken)}")

    def report(self, value: float, step: int) -> None:
        """Gives the pruner a value; NaN is ignored, and with several objectives all, until the costs are noted."""
        if not math.isfinite(value):
            return
        if self.access.objectives == 1:
            self._trial.report(float(value), step)
        elif self.access.pruner is not None and all(cost in self.metrics for cost in self.access.costs):
            # Optuna takes intermediate values of a single objective only.
            costs = [self.metrics[cost] for cost in self.access.costs]
            self._trial.set_user_attr(
                REPORTS, with_report(self._trial.user_attrs.get(REPORTS), costs, float(value), step)
            )

    def should_prune(self) -> bool:
        """Returns whether the pruner wants the trial to end."""
        if self.access.objectives == 1:
            return self._trial.should_prune()
        # With no pruner there is nothing to ask the storage for.
        return self.access.pruner is not None and self.study.pruner.prune(
            self.study, self.study.get_trials(deepcopy=False)[self.number]
        )

    def complete(self, returned: Any) -> None:
        """Records the objectives: the values that the task returned, then the costs.

        Raises:
            QuantizationError: too many or too few, one that is no finite number, or a metric that was never noted.
        """
        values = [*_numbers(returned), *self._noted(self.access.costs, "cost")]
        if len(values) != self.access.objectives:
            raise QuantizationError(
                f"hydra.sweeper.direction has {self.access.objectives} entries, the task gave {len(values)} values: "
                f"{values}"
            )
        raise_all(
            QuantizationError,
            "the trial failed",
            [f"its objective is {value}" for value in values if not math.isfinite(value)],
        )
        self._noted([limit.name for limit in self.access.constraints], "constraint on")
        self.tell(TrialState.COMPLETE, values)

    def fail(self, error: str, interrupted: bool = False) -> None:
        """Records that the trial failed, and why."""
        self.tell(TrialState.FAIL, None, {ERROR: error} | ({INTERRUPTED: True} if interrupted else {}))

    def tell(
        self, state: TrialState, values: Sequence[float] | None = None, attrs: Mapping[str, Any] | None = None
    ) -> None:
        """Records how the trial ended, unless another process has marked it as failed.

        Args:
            state: complete, pruned or failed.
            values: of the objectives, of a complete trial.
            attrs: further user attributes.
        """
        try:
            for limit in self.access.constraints:
                if limit.name in self.metrics and math.isfinite(self.metrics[limit.name]):
                    with quiet():
                        self._trial.set_constraint(str(limit), limit.violation(self.metrics))
            for name, value in {**({METRICS: self.metrics} if self.metrics else {}), **(attrs or {})}.items():
                self._trial.set_user_attr(name, value)
            self.study.tell(self.number, values, state)
        except (UpdateFinishedTrialError, ValueError):
            if not self.study._storage.get_trial(self._id).state.is_finished():
                raise
            log.warning(TAKEN_FOR_DEAD, self.number)

    def _noted(self, names: Iterable[str], what: str) -> list[float]:
        missing = [
            f"{what} {name}: no such value was noted; noted: "
            f"{', '.join(self.metrics) or 'nothing'}.{did_you_mean(name, self.metrics)}"
            for name in names
            if name not in self.metrics
        ]
        raise_all(QuantizationError, "is lq_plugin.search.sweep.trial_report.TrialReport among the callbacks?", missing)
        return [self.metrics[name] for name in names]


_current: JobTrial | None = None


def current_trial() -> JobTrial | None:
    """Returns the trial that this process evaluates; None outside a sweep of `hydra/sweeper=lq`."""
    return _current


@dataclass(frozen=True)
class TrialJob:
    """A task function that also records how its trial went; pickled to the process in which the launcher runs it.

    Args:
        task: the project's own.
        access: the study.
    """

    task: Callable[[Any], Any]
    access: StudyAccess

    @classmethod
    def wrapping(cls, task: Callable[[Any], Any], access: StudyAccess) -> TrialJob:
        """Returns a job with the name and the module of `task`, for callbacks that look at them."""
        job = cls(task, access)
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(task, name):
                object.__setattr__(job, name, getattr(task, name))
        return job

    def __call__(self, cfg: Any) -> Any:
        hide_passwords(passwords_in(self.access.storage))
        return self.run(HydraConfig.get().job.num, cfg)

    def run(self, number: int, cfg: Any) -> Any:
        """Evaluates the trial and returns what the task returned; None when it was pruned.

        Raises:
            TrialFailure: the task raised, or gave no finite number.
            KeyboardInterrupt: also when Lightning took it and left.
            StudyError: the trial is not running.
        """
        global _current
        trial = JobTrial(self.access.open(), number, self.access)
        error, stopped = "", False
        with beating(trial.study._storage, [trial._id]):
            _current = trial
            try:
                returned = self.task(cfg)
                trial.complete(returned)
                return returned
            except TrialPruned as pruned:
                log.info("trial %d was pruned%s", number, f": {pruned}" if str(pruned) else "")
                trial.tell(TrialState.PRUNED)
                return None
            except BaseException as exception:
                error, stopped = traceback.format_exc(), _is_interrupt(exception)
                trial.fail(error, stopped or _is_termination(exception))
            finally:
                _current = None
        # Out here the exception is gone, and with it the frames that hold a model on the device.
        _free_memory()
        if stopped:
            raise KeyboardInterrupt
        raise TrialFailure(f"trial {number} failed\n{error}")


@contextlib.contextmanager
def beating(storage: BaseStorage, trial_ids: Sequence[int]) -> Iterator[None]:
    """A context that gives signs of life for these trials, where the storage knows of any."""
    if not has_heartbeat(storage):
        yield
        return
    beat: Any = storage
    over = threading.Event()

    def beat_on() -> None:
        while not over.wait(beat.get_heartbeat_interval()):
            for trial_id in trial_ids:
                beat.record_heartbeat(trial_id)

    for trial_id in trial_ids:
        beat.record_heartbeat(trial_id)
    thread = threading.Thread(target=beat_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _numbers(returned: Any) -> list[float]:
    if returned is None:
        raise QuantizationError(
            "the task function returned None, not a number; in lightning-hydra-template set optimized_metric"
        )
    values = returned if isinstance(returned, Sequence) and not isinstance(returned, str) else [returned]
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise QuantizationError(
            f"the task function returned {returned!r}, which is neither a number nor a sequence of numbers"
        ) from None


def _is_interrupt(error: BaseException | None) -> bool:
    """Returns whether the error is a Ctrl-C, which Lightning turns into a `SystemExit`."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__ if isinstance(error, SystemExit) else None
    return False


def _is_termination(error: BaseException) -> bool:
    """Returns whether the error is Lightning's for SIGTERM, by name: not every job has Lightning."""
    return any(kind.__name__ == "SIGTERMException" for kind in type(error).__mro__)


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
