from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.commands.search import run as run_config
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.search import Evaluator, Rung, SearchResult, StudyError, evaluate_at, tpe
from lq_plugin.search.study.progress import SearchProgress
from lq_plugin.search.study.promotion import Ladder
from lq_plugin.search.study.trial_runs import log_trials

from .conftest import CPU
from .test_main import ROOT, composed
from .test_study import SPACE, interrupted, run

#: Its 2-bit plans that are scaled by tensor are hopeless: they cost about what those by channel do.
RUNGS = [{"batches": 1}, {}, {"reconstruct": {"iterations": 4}}]


@pytest.fixture
def storage() -> InMemoryStorage:
    return InMemoryStorage()


@pytest.fixture
def validated(monkeypatch: Any) -> list[int]:
    """The number of batches of each validation, calibrations left out."""
    seen: list[int] = []
    original, step = Evaluator.validate, DigitsCNN.validation_step

    def validate(self: Evaluator) -> dict[str, float]:
        seen.append(0)
        return original(self)

    def count(self: DigitsCNN, batch: Any, batch_idx: int) -> None:
        # A calibration runs the same step, but logs nowhere.
        seen[-1] += "log" not in self.__dict__
        step(self, batch, batch_idx)

    monkeypatch.setattr(Evaluator, "validate", validate)
    monkeypatch.setattr(DigitsCNN, "validation_step", count)
    return seen


def by_state(result: SearchResult, state: TrialState) -> list[FrozenTrial]:
    return result.study.get_trials(deepcopy=False, states=(state,))


def test_only_what_is_near_the_front_climbs_and_the_rest_costs_the_subset(
    model: DigitsCNN, storage: InMemoryStorage, validated: list[int], tmp_path: Path
) -> None:
    given = {"promote_within": 0.02, "promote_first": 3, "output_dir": tmp_path}
    result = run(model, 12, fidelity=RUNGS, storage=storage, sampler=tpe, **given)
    complete, stopped = by_state(result, TrialState.COMPLETE), by_state(result, TrialState.PRUNED)
    assert len(complete) + len(stopped) == 12, "both kinds count as tried"
    assert [trial.number for trial in complete[:3]] == [0, 1, 2], "the first ones climb in any case"
    assert {len(trial.user_attrs["levels"]) for trial in stopped} >= {1}
    assert result.held_back == len(stopped) > 2
    assert f"{len(stopped)} more stopped below the top rung" in str(result.table().title)

    # Float validation and calibration read all three batches.
    expected = [3, 3]
    for trial in sorted(complete + stopped, key=lambda trial: trial.number):
        expected += [1, 3, 3][: len(trial.user_attrs["levels"])]
    assert validated == expected

    for trial in stopped:
        levels = trial.user_attrs["levels"]
        mine, number = levels[-1], len(levels) - 1
        others = [t.user_attrs["levels"] for t in complete + stopped if t.number < trial.number]
        better = [
            theirs[number]
            for theirs in others
            if len(theirs) > number
            and theirs[number]["val/acc"] - mine["val/acc"] > 0.02
            and theirs[number]["effective_bits"] <= mine["effective_bits"]
        ]
        assert better
        assert trial.user_attrs["held_back"].startswith(f"rung {number}: val/acc {mine['val/acc']:.6g}; trial ")
        assert trial.user_attrs["metrics"] == mine

    assert {c.number for c in result.candidates} == {trial.number for trial in complete}
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert len(rows) == len(result.front) == len(list((tmp_path / "plans").iterdir()))
    for row, c in zip(rows, result.front, strict=True):
        assert (row["level"], len(c.lower)) == ("2", 2)
        assert [float(row[f"level{i}/val/acc"]) for i in (0, 1)] == [metrics["val/acc"] for metrics in c.lower]
        assert float(row["val/acc"]) == c.metric
        assert "level0/effective_bits" not in row

    best = result.best()
    with Evaluator(model, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        for number, metrics in enumerate([*best.lower, best.metrics]):
            alone = evaluate_at(evaluator, best.plan, Rung.parse(RUNGS[number]))
            assert alone == {name: metrics[name] for name in alone}


def test_without_a_margin_of_its_own_a_level_takes_the_searchs_or_a_twentieth(
    model: DigitsCNN, monkeypatch: Any
) -> None:
    seen: dict[str, Any] = {}

    original = Ladder.__init__

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        seen["margins"], seen["float"] = self.margins, self.evaluator.float_metrics["val/acc"]

    monkeypatch.setattr(Ladder, "__init__", init)
    run(model, 1, fidelity=[{"batches": 1, "promote_within": 0.3}, {}])
    assert seen["margins"] == [0.3, pytest.approx(seen["float"] / 20)]
    run(model, 1, fidelity=[{"batches": 1}, {}], promote_within=0.5)
    assert seen["margins"] == [0.5, 0.5]


def test_a_wide_margin_lets_all_climb(model: DigitsCNN) -> None:
    result = run(model, 6, fidelity=RUNGS[:2], promote_within=1.0, promote_first=0)
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE] * 6
    assert all(len(t.user_attrs["levels"]) == 2 for t in result.study.trials)


def test_a_subset_that_is_no_subset_is_named(model: DigitsCNN, caplog: Any) -> None:
    run(model, 1, fidelity=[{"batches": 3}, {}])
    assert "rung 0 reads 3 batches: the validation has no more than 3" in caplog.text


def test_a_loss_is_better_when_it_is_smaller(model: DigitsCNN) -> None:
    result = run(model, 8, fidelity=RUNGS[:2], metric="val/loss", mode="min", promote_within=0.0, promote_first=1)
    stopped = by_state(result, TrialState.PRUNED)
    assert stopped
    for trial in stopped:
        mine = trial.user_attrs["levels"][0]
        others = [t.user_attrs["levels"][0] for t in result.study.trials if t.number < trial.number]
        assert any(o["val/loss"] < mine["val/loss"] and o["effective_bits"] <= mine["effective_bits"] for o in others)


@pytest.mark.slow
def test_a_pruner_decides_with_one_objective_also_about_trials_of_another_worker(
    model: DigitsCNN, tmp_path: Path
) -> None:
    pruner = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3}
    options: dict[str, Any] = {"cost": None, "fidelity": RUNGS[:2], "promote_within": 10.0, "output_dir": tmp_path}
    first = run(model, 3, **options, pruner=pruner)
    assert [t.state for t in first.study.trials] == [TrialState.COMPLETE] * 3
    assert [sorted(t.intermediate_values) for t in first.study.trials] == [[0, 1]] * 3
    second = run(model, 10, worker=1, **options, pruner=optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=0))
    stopped = by_state(second, TrialState.PRUNED)
    assert [t.number for t in stopped] == list(range(3, 10)), "no accuracy is 2"
    assert all(t.user_attrs["held_back"].endswith("the pruner stopped it") for t in stopped)
    third = run(model, 16, worker=2, **options, pruner=pruner)
    done = {t.number: t for t in third.study.trials if t.number > 9}
    median = sorted(t.intermediate_values[0] for t in first.study.trials)[1]
    assert {n: t.state for n, t in done.items() if t.intermediate_values[0] < median} == {
        n: TrialState.PRUNED for n, t in done.items() if t.intermediate_values[0] < median
    }
    assert third.best().metric == max(c.metric for c in third.candidates)


def test_without_a_pruner_none_decides(model: DigitsCNN) -> None:
    """Optuna's default is the median pruner."""
    result = run(model, 8, cost=None, fidelity=RUNGS[:2], promote_within=10.0)
    assert {t.state for t in result.study.trials} == {TrialState.COMPLETE}


def test_levels_are_part_of_what_a_study_was_made_for(model: DigitsCNN, storage: InMemoryStorage) -> None:
    run(model, 2, storage=storage, fidelity=RUNGS[:2])
    with pytest.raises(StudyError, match=r"fidelity: only in the study \{'batches': 1\}; only now \{'batches': 2\}"):
        run(model, 3, storage=storage, fidelity=[{"batches": 2}, {}])
    with pytest.raises(StudyError, match="fidelity: only in the study: "):
        run(model, 3, storage=storage)
    assert len(run(model, 3, storage=storage, fidelity=[{"batches": 1, "promote_within": 1.0}, {}]).study.trials) == 3


def test_a_plan_that_was_stopped_is_not_tried_again(model: DigitsCNN, storage: InMemoryStorage) -> None:
    options: dict[str, Any] = {"storage": storage, "fidelity": RUNGS[:2], "promote_within": 0.0, "promote_first": 1}
    result = run(model, 8, **options)
    stopped = by_state(result, TrialState.PRUNED)[0]
    twin = optuna.create_trial(state=TrialState.WAITING, params=stopped.params, distributions=stopped.distributions)
    optuna.load_study(study_name="lq_search", storage=storage).add_trial(twin)
    again = run(model, 9, **options)
    (repeated,) = [t for t in again.study.trials if "repeats" in t.user_attrs]
    assert repeated.user_attrs["repeats"] == stopped.number
    assert "levels" not in repeated.user_attrs
    assert len(again.candidates) + again.held_back == 9, "it does not count"


def test_constraints_go_with_levels(model: DigitsCNN) -> None:
    limits = ["quantizable_effective_bits <= 4", "val/acc >= 0.5"]
    result = run(model, 10, fidelity=RUNGS[:2], promote_within=0.02, promote_first=1, constraints=limits)
    stopped = [t for t in by_state(result, TrialState.PRUNED) if "levels" in t.user_attrs]
    assert stopped
    for trial in [*stopped, *by_state(result, TrialState.COMPLETE)]:
        assert trial.constraints["val/acc >= 0.5"] == pytest.approx(0.5 - trial.user_attrs["levels"][-1]["val/acc"])
        assert trial.constraints["quantizable_effective_bits <= 4"] <= 0
    assert all(c.metric >= 0.5 for c in result.candidates)
    assert result.held_back == len(stopped)


def test_a_metric_that_is_nan_at_a_level_fails_the_trial(model: DigitsCNN, monkeypatch: Any) -> None:
    original, calls = Evaluator.validate, []

    def nan(self: Evaluator) -> dict[str, float]:
        calls.append(0)
        return original(self) | ({"val/acc": float("nan")} if len(calls) == 3 else {})

    monkeypatch.setattr(Evaluator, "validate", nan)
    result = run(model, 2, fidelity=RUNGS[:2])
    (failed,) = by_state(result, TrialState.FAIL)
    assert "metric 'val/acc' is nan" in failed.user_attrs["error"]
    assert "levels" not in failed.user_attrs


@pytest.mark.slow
def test_an_interrupted_trial_goes_on_at_its_level(tmp_path: Path, monkeypatch: Any) -> None:
    # Float validation, calibration, three rungs of the first trial; the second one is stopped at its second rung.
    interrupted(
        "Evaluator.validate", 7, "signal.SIGINT, signal.SIGINT", 4, tmp_path, f"fidelity={RUNGS!r}, promote_first=9"
    )
    study = optuna.load_study(study_name="lq_search", storage=f"sqlite:///{tmp_path}/study.db")
    (lost,) = study.get_trials(states=(TrialState.FAIL,))
    assert len(lost.user_attrs["levels"]) == 1

    original, calls = Evaluator.validate, []
    monkeypatch.setattr(Evaluator, "validate", lambda self: calls.append(0) or original(self))
    torch.manual_seed(0)
    result = run(DigitsCNN(width=4), 3, output_dir=tmp_path, fidelity=RUNGS, promote_first=9)
    (retried,) = [t for t in result.study.trials if t.user_attrs.get("retries") == lost.number]
    assert retried.state == TrialState.COMPLETE
    assert retried.user_attrs["levels"][0] == lost.user_attrs["levels"][0]
    # Float validation, calibration, three rungs of the plan that waited, and the two that were missing.
    assert len(calls) == 2 + 3 + 2


@pytest.mark.slow
def test_two_workers_share_the_levels(tmp_path: Path) -> None:
    code = """
import sys, torch
from lq_plugin.demo.digits import DigitsCNN
from pathlib import Path
from tests.search.test_study import run
torch.manual_seed(0)
torch.set_num_threads(1)
levels = [{"batches": 1}, {}]
options = {"fidelity": levels, "promote_within": 0.0, "promote_first": 2, "heartbeat": 1}
run(DigitsCNN(width=4), 24, output_dir=Path(sys.argv[1]), worker=int(sys.argv[2]), metric="val/loss", mode="min", **options)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(n)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for n in (0, 1)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    trials = optuna.load_study(study_name="lq_search", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    tried = [t for t in trials if "levels" in t.user_attrs]
    assert 24 <= len(tried) <= 25
    assert len({frozenset(t.params.items()) for t in tried}) == len(tried)
    stopped = [t for t in tried if t.state == TrialState.PRUNED]
    assert stopped
    for trial in stopped:
        mine = trial.user_attrs["levels"][0]
        beaten_by = [t.user_attrs["levels"][0] for t in tried if t is not trial]
        assert any(
            o["val/loss"] < mine["val/loss"] and o["effective_bits"] <= mine["effective_bits"] for o in beaten_by
        )


def test_levels_in_yaml(tmp_path: Path, capsys: Any) -> None:
    fidelity = "search.fidelity=[{batches: 1},{qat: {max_steps: 2, lr: 0.001}}]"
    result = run_config(
        composed(tmp_path, "search.n_trials=3", fidelity, "search.promote_first=2", "search.promote_within=0.5")
    )
    assert len(result.candidates) + result.held_back == 3
    assert all(len(c.lower) == 1 for c in result.candidates)
    assert "front of" in capsys.readouterr().out
    with pytest.raises(QuantizationError, match="rung 0: unknown option 'epochs' of qat"):
        run_config(composed(tmp_path, "search.fidelity=[{qat: {epochs: 1, max_epochs: 1}}]"))
    pruner = "search.pruner={_target_: optuna.pruners.MedianPruner}"
    with pytest.raises(QuantizationError, match="a pruner decides about one objective"):
        run_config(composed(tmp_path, fidelity, pruner))


def test_the_bar_counts_trials_that_stopped(capsys: Any) -> None:
    bar = SearchProgress(10, "val/acc")
    bar.update(4, None, 1, 2)
    (task,) = bar._progress.tasks
    assert (task.completed, task.description) == (4, "2 stopped early, 1 failed")
    last = optuna.trial.create_trial(values=[0.5, 3.0])
    bar.update(5, last)
    assert task.description == "val/acc 0.5 at 3"


def test_a_wandb_run_has_a_step_for_each_level(model: DigitsCNN, monkeypatch: Any) -> None:
    import wandb

    result = run(model, 2, fidelity=RUNGS[:2])
    logged: list[dict[str, float]] = []
    ids: list[list[str]] = [[], []]

    class Run:
        log = staticmethod(logged.append)
        group, tags = None, None
        project, entity, offline, settings = "p", None, True, type("Settings", (), {"root_dir": "."})

        def finish(self) -> None:
            pass

    monkeypatch.setattr(wandb, "Settings", lambda **options: None)
    for written in ids:
        logged.clear()
        monkeypatch.setattr(wandb, "init", lambda written=written, **options: written.append(options["id"]) or Run())
        log_trials(type("Logger", (), {"experiment": Run()})(), result)  # type: ignore[arg-type]
        result.study.set_user_attr("what a study learns later", 1.0)
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == len(result.candidates)
    assert [row["val/acc"] for row in logged] == [
        v for c in result.candidates for v in (c.lower[0]["val/acc"], c.metric)
    ]
