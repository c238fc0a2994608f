"""Writes a study to Lightning loggers while it goes on: a row for each trial, the front, and what is best so far."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from lq_plugin import plots
from lq_plugin.callbacks.monitor.loggers import Picture, Report, add_hparams, report_to
from lq_plugin.intent.flat_keys import layer_keys
from lq_plugin.report import render
from lq_plugin.report.provenance import provenance
from lq_plugin.search.study.candidates import Candidate
from lq_plugin.search.study.report import study_report
from lq_plugin.search.study.result import SearchResult
from lq_plugin.search.study.trial_runs import log_trials
from lq_plugin.utilities.lightning_packages import either

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


class StudyLogs:
    """The loggers of a search.

    A row has all that a trial scored, as `search/NAME` at the step of its number, and the best metric so far
    (`search/best/NAME`), in the end the mean of the best plan's looks where plans were scored again. Rows are in the
    order of the trials: one waits until the trials before it are over. W&B and TensorBoard also get the front as table
    and picture while the search goes on.

    Args:
        loggers: of Lightning; W&B's gets a run for each trial also, and TensorBoard's a row of HParams, where
            `trial_runs` says so.
        trial_runs: whether it does.
        every: seconds between two pictures of the front, at least.
    """

    def __init__(self, loggers: Iterable[Logger], trial_runs: bool = True, every: float = 10.0) -> None:
        self.loggers, self.trial_runs, self.every = list(loggers), trial_runs, every
        self._written: set[int] = set()
        self._best: float | None = None
        self._front: list[int] = []
        self._drawn = time.monotonic()
        self._since = datetime.now()

    def update(self, result: SearchResult) -> None:
        """Writes what is new, after a trial."""
        ahead = result.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        # What runs since before these logs may be of a worker that was killed: nothing waits for it.
        first = min(
            (t.number for t in ahead if t.datetime_start is None or t.datetime_start >= self._since), default=None
        )
        self._write_rows(result, [c for c in result.candidates if first is None or c.number < first])
        front = [c.number for c in result.front]
        if self._written and front != self._front and time.monotonic() - self._drawn >= self.every:
            self._front, self._drawn = front, time.monotonic()
            report = Report(max(self._written), tables={"front": result.rows()}, pictures=[_picture(result)])
            for logger in self.loggers:
                # Others would keep a file for each picture.
                if isinstance(logger, (either("loggers.WandbLogger"), either("loggers.TensorBoardLogger"))):
                    report_to(logger, report)

    def finish(self, result: SearchResult) -> None:
        """Writes the rest: tables, the page, a run of W&B for each trial, and the best plan as the run's summary."""
        self._write_rows(result, result.candidates)
        best = result.best() if result.candidates else None
        for logger in self.loggers:
            if best is not None:
                if best.interval is not None:
                    estimate = {f"search/best/{result.metric}": best.estimate}
                    logger.log_metrics(estimate, step=result.candidates[-1].number)
                report_to(logger, _last_report(result, best))
            if isinstance(logger, either("loggers.WandbLogger")):
                if best is not None:
                    numbers = {**best.metrics, **best.confirmed}
                    summary: dict[str, Any] = {f"search/{name}": value for name, value in numbers.items()}
                    # Without it a summary holds the values of the last trial.
                    logger.experiment.summary.update(summary | {"search/best/trial": best.number})
                if self.trial_runs:
                    log_trials(logger, result)
            elif isinstance(logger, either("loggers.TensorBoardLogger")) and self.trial_runs:
                for c in result.candidates:
                    add_hparams(logger, f"trial_{c.number:04d}", layer_keys(c.plan), {**c.metrics, **c.confirmed})
        self.close("success")

    def close(self, status: str) -> None:
        """Ends the loggers' runs; what they keep in memory is written."""
        for logger in self.loggers:
            logger.finalize(status)

    def _write_rows(self, result: SearchResult, candidates: Iterable[Candidate]) -> None:
        pick = max if result.maximize else min
        for c in candidates:
            if c.number in self._written:
                continue
            self._written.add(c.number)
            self._best = c.metric if self._best is None else pick(self._best, c.metric)
            row = {f"search/{name}": value for name, value in c.metrics.items()}
            for logger in self.loggers:
                logger.log_metrics(row | {f"search/best/{result.metric}": self._best}, step=c.number)


def _picture(result: SearchResult) -> Picture:
    return Picture("pareto", "pareto", plots.to_png(result.figure()))


def _last_report(result: SearchResult, best: Candidate) -> Report:
    page = replace(study_report(result), provenance=provenance())
    tables: Mapping[str, Any] = {
        "front": result.rows(),
        "trials": [{"trial": c.number, **c.metrics, **c.confirmed, "origin": c.origin} for c in result.candidates],
    }
    return Report(
        result.candidates[-1].number,
        tables=tables,
        pictures=[_picture(result)],
        plan=best.plan,
        final=True,
        pages={"report.json": page.to_json().encode(), "report.html": render(page).encode()},
    )
