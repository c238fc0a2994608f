"""The loop of one worker over the trials of a study, which other workers may share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from lq_plugin.errors import QuantizationError
from lq_plugin.search.shared.database import StudyError, alone_with, has_heartbeat, quiet
from lq_plugin.search.shared.interrupt import StopRequest
from lq_plugin.search.shared.others import TAKEN_FOR_DEAD, OtherWorkers
from lq_plugin.search.study.objective import ERROR, ORIGIN, PLAN, RETRIES, Objective, held_back
from lq_plugin.search.study.promotion import RUNGS
from lq_plugin.search.study.proposer import Proposer

log = logging.getLogger(__name__)

_COMPLETE, _RUNNING, _WAITING = TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING


class Loop:
    """The trials of one worker."""

    def __init__(
        self,
        study: Study,
        objective: Objective,
        proposer: Proposer,
        n_trials: int,
        max_failures: int,
        stop: StopRequest,
    ) -> None:
        self.study, self.objective, self.proposer = study, objective, proposer
        self.n_trials, self.max_failures, self.stop = n_trials, max_failures, stop
        self.failed: list[FrozenTrial] = []
        #: Tracebacks of looks at plans that failed, which count as failures also.
        self.failed_looks: list[str] = []
        #: Whether the proposer has no new plan.
        self._ended = False
        self.shown: Any = None
        #: Called after each trial.
        self.after: Callable[[], object] = lambda: None
        #: Only then do the trials of a killed worker end.
        self.heartbeat = has_heartbeat(study._storage)
        self.others = OtherWorkers(study)

    def run(self, bar: AbstractContextManager[Any]) -> None:
        """Evaluates trials until the study has enough, no plan is new, too many fail, or a signal asks to stop."""
        with bar as self.shown, quiet():
            self._show(None)
            while self._missing() > 0:
                if self.stop or self.too_many_failed or self._exhausted():
                    break
                with ExitStack() as turn:
                    # Nobody else takes a trial between this count and the moment when ours runs, and counts.
                    turn.enter_context(alone_with(self.study))
                    if wanted := not self.heartbeat or self._count(_RUNNING) < self._missing():
                        self.objective.begun = turn.close
                        self._one_trial()
                if not wanted:
                    # Others do the rest; should one of them have been killed, its trial fails, and is missing again.
                    self.others.wait()
            self._reap()
        self.check()

    @property
    def too_many_failed(self) -> bool:
        """True once more trials and looks of this run have failed than may."""
        return len(self.failed) + len(self.failed_looks) > self.max_failures

    def check(self) -> None:
        """Gives up where too many trials and looks of this run have failed.

        Raises:
            StudyError: with the traceback of the last one.
        """
        if not self.too_many_failed:
            return
        looks = f" and {len(self.failed_looks)} looks" if self.failed_looks else ""
        errors = [trial.user_attrs.get(ERROR, "no traceback") for trial in self.failed] + self.failed_looks
        raise StudyError(
            f"{len(self.failed)} trials{looks} of this run failed, max_failures is {self.max_failures}; the last "
            f"one:\n{errors[-1]}"
        )

    def _one_trial(self) -> None:
        self.others.go_on()
        if not self._count(_WAITING) and not self.proposer.publish():
            log.warning("no new plan keeps the constraints: the search ends with %d trials", self._count(_COMPLETE))
            self._ended = True
            return
        try:
            self.study.optimize(self.objective, n_trials=1, catch=(Exception,), callbacks=[self._after])
        except KeyboardInterrupt:
            _try_again(self.study, self.objective.interrupted)
            raise
        except (UpdateFinishedTrialError, ValueError, AssertionError) as refused:
            # The last of a trial that is FAIL when its value is told: Optuna's own ends with "Should not reach."
            if isinstance(refused, QuantizationError) or not self._taken_for_dead():
                raise

    def _missing(self) -> int:
        return self.n_trials - self._count(_COMPLETE) - self._held_back()

    def _taken_for_dead(self) -> bool:
        """Returns whether another worker has marked this one's trial as failed, because it gave no sign of life."""
        trial = self.objective.trial
        if trial is None or trial.number in {failed.number for failed in self.failed}:
            return False
        if self.study.get_trials(deepcopy=False)[trial.number].state != TrialState.FAIL:
            return False
        log.warning(TAKEN_FOR_DEAD, trial.number)
        return True

    def _exhausted(self) -> bool:
        """Returns whether every plan of the space has been tried, or the proposer has no new one."""
        if self._ended:
            return True
        size = self.proposer.space.size
        if size > 10_000:
            return False
        tried = self.study.get_trials(deepcopy=False, states=(_COMPLETE, TrialState.PRUNED))
        return len({frozenset(trial.params.items()) for trial in tried}) >= size

    def _count(self, state: TrialState) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(state,)))

    def _held_back(self) -> int:
        """Returns the number of trials that stopped below the top rung; each of them has cost an evaluation."""
        if self.objective.ladder is None:
            return 0
        return len(held_back(self.study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))))

    def _after(self, study: Study, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL:
            self.failed.append(trial)
            log.warning("trial %d failed: %s", trial.number, _last_line(trial))
        self._show(trial)
        self.after()

    def _show(self, last: FrozenTrial | None) -> None:
        if self.shown is not None:
            stopped = self._held_back()
            complete = self.study.get_trials(deepcopy=False, states=(_COMPLETE,))
            scores = [t.values[0] for t in complete if all(excess <= 0 for excess in t.constraints.values())]
            self.shown.update(len(complete) + stopped, last, len(self.failed), stopped, scores)

    def _reap(self) -> None:
        """Leaves no trial of a killed worker running, if this worker is the last one."""
        storage = self.study._storage
        interval = storage.get_heartbeat_interval() if self.heartbeat else None  # type: ignore[attr-defined]
        until = time.monotonic() + 4 * (interval or 0)
        while not self.stop and self._count(_RUNNING) and time.monotonic() < until:
            self.others.wait()


def _try_again(study: Study, trial: Trial | None) -> None:
    """Enqueues an interrupted trial, so that the next run takes it up."""
    if trial is not None and trial.params:
        kept = {name: trial.user_attrs[name] for name in (ORIGIN, PLAN, RUNGS) if name in trial.user_attrs}
        attrs = kept | {RETRIES: trial.number}
        study.add_trial(
            create_trial(state=_WAITING, params=trial.params, distributions=trial.distributions, user_attrs=attrs)
        )


def _last_line(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(ERROR, "no traceback")).strip().splitlines()[-1]
