"""Loggers of a search: rows come while it goes on, in the order of the trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.search import SearchResult, StudyLogs, search

from .conftest import CPU

SPACE = {"weight": {"bit_widths": [2, 4, 8], "granularities": ["per_channel"]}}


class Recorder(DummyLogger):
    """Keeps the rows that it is given, and how many trials the study had by then."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        self.rows.append((step, metrics))


def run(model: DigitsCNN, trials: int, **options: Any) -> SearchResult:
    return search(
        model, DigitsDataModule(batch_size=120), SPACE, "val/acc", trials, trainer=CPU, calibration_batches=1,
        progress=False, seeds=0, **options,
    )  # fmt: skip


def test_rows_come_while_the_search_goes_on(model: DigitsCNN) -> None:
    logger = Recorder()
    logs = StudyLogs([logger])
    seen: list[tuple[int, int]] = []

    def after(result: SearchResult) -> None:
        logs.update(result)
        seen.append((len(result.candidates), len(logger.rows)))

    result = run(model, 3, on_trial=after)
    # The last of the three has no trial before it that is not over.
    assert seen == [(1, 1), (2, 2), (3, 3)]
    logs.finish(result)
    assert [step for step, _ in logger.rows] == [c.number for c in result.candidates]
    best = [row["search/best/val/acc"] for _, row in logger.rows]
    scores = [row["search/val/acc"] for _, row in logger.rows]
    assert scores == [c.metric for c in result.candidates]
    assert best == [max(scores[: n + 1]) for n in range(len(scores))]
    # Names of the objectives, for dashboards.
    assert result.study.metric_names == ["val/acc", "effective_bits"]


def test_the_best_score_is_the_mean_of_its_looks_in_the_end(model: DigitsCNN) -> None:
    logger = Recorder()
    result = run(model, 2, confirm={"looks": 3, "most": 6})
    StudyLogs([logger]).finish(result)
    best = result.best()
    assert best.interval is not None
    assert logger.rows[-1] == (1, {"search/best/val/acc": best.interval.mean})


def test_a_row_waits_for_the_trials_before_it(model: DigitsCNN) -> None:
    result = run(model, 3)
    logger = Recorder()
    logs = StudyLogs([logger])
    unfinished = result.study.ask()
    assert unfinished.number == 3
    params = result.candidates[0]
    later = optuna.trial.create_trial(
        values=params.values,
        params=result.study.trials[params.number].params,
        distributions=result.study.trials[params.number].distributions,
        user_attrs=result.study.trials[params.number].user_attrs,
    )
    result.study.add_trial(later)
    now = SearchResult(result.study, "val/acc", ["effective_bits"], True, result.float_metrics)
    assert [c.number for c in now.candidates] == [0, 1, 2, 4]
    logs.update(now)
    assert [step for step, _ in logger.rows] == [0, 1, 2]
    logs.finish(now)
    assert [step for step, _ in logger.rows] == [0, 1, 2, 4]


def test_the_front_is_drawn_while_the_search_goes_on(model: DigitsCNN, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="study")
    logs = StudyLogs([logger], every=0.0)
    fronts: list[list[int]] = []

    def after(result: SearchResult) -> None:
        logs.update(result)
        fronts.append([c.number for c in result.front])

    logs.finish(run(model, 3, on_trial=after))
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    changes = sum(before != after for before, after in zip([[], *fronts], fronts, strict=False))
    # One for each front that differs from the one before, and the last one.
    assert len(events.Images("quant/pareto")) == changes + 1
    assert [event.step for event in events.Scalars("search/val/acc")] == [0, 1, 2]


def test_trials_are_rows_of_hparams(model: DigitsCNN, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="study", version="only")
    result = run(model, 3)
    StudyLogs([logger]).finish(result)
    folders = {path.name: path for path in (tmp_path / "study" / "only").iterdir() if path.is_dir()}
    assert folders.keys() == {f"trial_{c.number:04d}" for c in result.candidates}
    for c in result.candidates:
        events = EventAccumulator(str(folders[f"trial_{c.number:04d}"]))
        events.Reload()
        content = events.summary_metadata
        start = metadata.parse_session_start_info_plugin_data(
            content[metadata.SESSION_START_INFO_TAG].plugin_data.content
        )
        params = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
        # The bits of each layer as the plan has them, under a name of its own.
        weights = {f"bits.{rule.match}": rule.weight.bit_width for rule in c.plan.rules if rule.weight is not None}
        assert len(weights) == 6
        assert {name: params[name] for name in weights} == weights
        scalars = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        assert scalars["val/acc"] == pytest.approx(c.metric, abs=1e-6)
        assert scalars["effective_bits"] == pytest.approx(c.effective_bits, rel=1e-6)
    other = TensorBoardLogger(tmp_path, name="study", version="other")
    StudyLogs([other], trial_runs=False).finish(result)
    assert not [path for path in (tmp_path / "study" / "other").iterdir() if path.is_dir()]


@pytest.mark.parametrize("maximize", [True, False])
def test_the_bar_names_the_best_so_far(maximize: bool) -> None:
    from lq_plugin.search.study.progress import SearchProgress

    bar = SearchProgress(10, "val/acc", maximize)
    bar.update(2, optuna.trial.create_trial(values=[0.5, 3.0]), scores=[0.25, 0.75])
    (task,) = bar._progress.tasks
    assert task.description == f"val/acc 0.5 at 3, best {0.75 if maximize else 0.25}"
