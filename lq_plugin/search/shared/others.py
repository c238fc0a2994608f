"""Waiting while the trials that are left belong to other workers."""

from __future__ import annotations

import logging
import time

import optuna
from optuna import Study
from optuna.trial import TrialState

from lq_plugin.search.shared.database import quiet

log = logging.getLogger(__name__)

#: What a worker says whose trial another one has failed.
TAKEN_FOR_DEAD = "this process gave no sign of life for so long that trial %d was taken from it: it is tried again"
#: Seconds between two looks at what other workers do.
POLL = 0.5
#: Seconds of waiting after which a worker says what it waits for, and after which it says so again.
_FIRST_WORD, _NEXT_WORD = 5.0, 60.0


class OtherWorkers:
    """Waits for the trials of other workers and says so; those of workers that are gone return to the queue.

    Args:
        study: shared, in a storage with a heartbeat.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._speak_at: float | None = None

    def wait(self) -> None:
        """Marks trials without a sign of life as failed, then sleeps for a moment."""
        with quiet():
            optuna.storages.fail_stale_trials(self.study)
        running = [trial.number for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
        now = time.monotonic()
        if self._speak_at is None:
            self._speak_at = now + _FIRST_WORD
        elif now >= self._speak_at and running:
            interval = self.study._storage.get_heartbeat_interval()  # type: ignore[attr-defined]
            log.warning(
                "waiting for trials %s of other workers; one without a sign of life (every %d s) is tried again",
                ", ".join(map(str, running)),
                interval,
            )
            self._speak_at = now + _NEXT_WORD
        time.sleep(POLL)

    def go_on(self) -> None:
        """Forgets how long this worker has waited."""
        self._speak_at = None
