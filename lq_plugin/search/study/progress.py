"""The progress bar of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class SearchProgress:
    """A bar with the finished trials of all workers, failures, and the scores of the latest trial and the best one.

    Args:
        n_trials: to reach.
        metric: name of the first objective.
        maximize: whether more of it is better.
    """

    def __init__(self, n_trials: int, metric: str, maximize: bool = True) -> None:
        self.metric, self._best = metric, max if maximize else min
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self._progress = Progress(
            TextColumn("search"), BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.description}")
        )
        self._task = self._progress.add_task("", total=n_trials)

    def __enter__(self) -> SearchProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()

    def update(
        self,
        complete: int,
        last: FrozenTrial | None = None,
        failed: int = 0,
        stopped: int = 0,
        scores: Sequence[float] = (),
    ) -> None:
        """Shows the state after a trial.

        Args:
            complete: trials of the study that are over.
            last: the trial that has just ended.
            failed: failed trials of this run.
            stopped: trials that ended below the top rung; they are among the complete ones.
            scores: metrics of all complete trials that keep the constraints.
        """
        text = f"{self.metric} {last.values[0]:.4g} at {last.values[1]:.4g}" if last is not None and last.values else ""
        parts = [text] * bool(text) + [f"best {self._best(scores):.4g}" for _ in scores[:1]]
        parts += [f"{stopped} stopped early"] * bool(stopped) + [f"{failed} failed"] * bool(failed)
        self._progress.update(self._task, completed=complete, description=", ".join(parts))
