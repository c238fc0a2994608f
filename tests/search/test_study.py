from __future__ import annotations

import copy
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
from optuna.trial import TrialState
from torch import nn

from lq_plugin import PTQ, QuantPlan
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.model.survey import Survey
from lq_plugin.search import Evaluator, SearchResult, Space, StudyError, search, tpe
from lq_plugin.search.evaluation import evaluator as evaluator_module
from lq_plugin.search.shared.storage import FINGERPRINT, differences, open_study

from .conftest import CPU
from .test_evaluator import Batches, quiet_trainer

SPACE = {
    "weight": {"bit_widths": [2, 3, 8], "granularities": ["per_channel", "per_tensor"], "ranges": ["mse"]},
    "input": "uint8 affine mse",
}


@pytest.fixture
def storage() -> InMemoryStorage:
    return InMemoryStorage()


def run(model: DigitsCNN, n_trials: int, **options: Any) -> SearchResult:
    given = {
        "space": SPACE,
        "metric": "val/acc",
        "trainer": CPU,
        "calibration_batches": 1,
        "progress": False,
        "seeds": 0,
    } | options
    return search(model, DigitsDataModule(batch_size=120), n_trials=n_trials, **given)


def test_a_search_writes_its_front_and_every_plan_reproduces_its_metric(model: DigitsCNN, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = Batches(2)
    result = run(model, 8, output_dir=tmp_path, dataloader=batches, calibration_batches=2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    assert len(result.candidates) == 8
    assert [c.origin for c in result.candidates[:3]] == ["uniform 2 bits", "uniform 3 bits", "uniform 8 bits"]
    assert {c.origin for c in result.candidates[3:]} == {"sampled"}
    assert [c.cost for c in result.front] == sorted(c.cost for c in result.front)
    for c in result.front:
        better = [
            o
            for o in result.candidates
            if o.metric >= c.metric and o.cost <= c.cost and (o.metric, o.cost) != (c.metric, c.cost)
        ]
        assert not better

    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert [row["plan"] for row in rows] == [c.file_name for c in result.front]
    assert {path.name for path in (tmp_path / "plans").iterdir()} == {row["plan"] for row in rows}
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")

    for row, c in zip(rows, result.front, strict=True):
        path = tmp_path / "plans" / row["plan"]
        assert QuantPlan.from_yaml(path) == c.plan
        trainer = quiet_trainer(callbacks=[PTQ(path, calibration_batches=2, dataloader=batches)])
        fresh = DigitsCNN(width=8)
        fresh.load_state_dict(before)
        (reported,) = trainer.validate(fresh, datamodule=DigitsDataModule(batch_size=120), verbose=False)
        assert reported["val/acc"] == float(row["val/acc"]) == c.metric
        assert reported["val/loss"] == float(row["val/loss"])


def test_a_study_goes_on_where_it_stopped_and_counts_all_its_trials(model: DigitsCNN, tmp_path: Path) -> None:
    first = run(model, 4, output_dir=tmp_path)
    second = run(model, 7, output_dir=tmp_path)
    assert [c.number for c in second.candidates] == list(range(7))
    assert [(c.plan, c.metric) for c in second.candidates[:4]] == [(c.plan, c.metric) for c in first.candidates]
    sampled = [c.plan for c in second.candidates[3:]]
    assert len(set(map(str, sampled))) == 4, "the sampler started from its first seed again"
    third = run(model, 7, output_dir=tmp_path)
    assert len(third.study.trials) == 7, "a study that is complete evaluates nothing"


def test_the_same_seed_finds_the_same(model: DigitsCNN) -> None:
    one, other = run(model, 6), run(model, 6)
    assert [(c.plan, c.metric, c.cost) for c in one.candidates] == [
        (c.plan, c.metric, c.cost) for c in other.candidates
    ]
    worker = run(model, 6, worker=1)
    assert [c.plan for c in worker.candidates[3:]] != [c.plan for c in one.candidates[3:]]


def test_best_and_its_errors(model: DigitsCNN) -> None:
    result = run(model, 5)
    assert result.best().metric == max(c.metric for c in result.candidates)
    small = result.best(3.5)
    assert small.cost <= 3.5
    assert small.metric == max(c.metric for c in result.candidates if c.cost <= 3.5)
    with pytest.raises(QuantizationError, match=r"no plan with effective_bits <= 1\.0: the smallest has 2"):
        result.best(1.0)
    assert result.table().row_count == len(result.front) + 1


def test_the_smallest_loss_and_other_costs_can_be_searched_for(model: DigitsCNN) -> None:
    result = run(model, 4, metric="val/loss", mode="min", cost="bytes", space={"weight": ["int2 mse", "int8", "float"]})
    assert result.study.directions == [optuna.study.StudyDirection.MINIMIZE] * 2
    assert result.best().metric == min(c.metric for c in result.candidates)
    assert all(c.cost == c.metrics["bytes"] for c in result.candidates)


def test_a_trial_that_raises_is_recorded_and_the_search_goes_on(
    model: DigitsCNN, monkeypatch: Any, caplog: Any
) -> None:
    original, calls = Evaluator.evaluate_layers, []

    def sometimes(self: Evaluator, plans: Any) -> Any:
        calls.append(plans)
        if len(calls) in (2, 4):
            raise RuntimeError("out of something")
        return original(self, plans)

    monkeypatch.setattr(Evaluator, "evaluate_layers", sometimes)
    result = run(model, 4)
    failed = [t for t in result.study.trials if t.state == TrialState.FAIL]
    assert [t.number for t in failed] == [1, 3]
    assert "out of something" in failed[0].user_attrs["error"]
    assert "Traceback" in failed[0].user_attrs["error"]
    assert QuantPlan.from_dict(failed[0].user_attrs["plan"])
    assert len(result.candidates) == 4
    assert "trial 1 failed: RuntimeError: out of something" in caplog.text


def test_too_many_failures_end_it_with_the_last_traceback(model: DigitsCNN, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Evaluator, "evaluate_layers", lambda self, plans: 1 / 0)
    with pytest.raises(StudyError, match=r"3 trials of this run failed, max_failures is 2.*(.|\n)*ZeroDivisionError"):
        run(model, 20, output_dir=tmp_path, max_failures=2)
    assert (tmp_path / "front.csv").exists()


def test_a_metric_that_is_nan_fails_the_trial(model: DigitsCNN, monkeypatch: Any) -> None:
    original = Evaluator.validate
    calls = []

    def nan(self: Evaluator) -> dict[str, float]:
        calls.append(0)
        return original(self) | ({"val/acc": float("nan")} if len(calls) == 3 else {})

    monkeypatch.setattr(Evaluator, "validate", nan)
    (failed,) = [t for t in run(model, 3).study.trials if t.state == TrialState.FAIL]
    assert "metric 'val/acc' is nan" in failed.user_attrs["error"]


def test_equal_trials_are_evaluated_once(model: DigitsCNN, monkeypatch: Any, storage: InMemoryStorage) -> None:
    original, calls = Evaluator.evaluate_layers, []
    monkeypatch.setattr(Evaluator, "evaluate_layers", lambda self, plans: calls.append(0) or original(self, plans))
    first = run(model, 3, storage=storage).study.trials[0]
    twin = optuna.create_trial(state=TrialState.WAITING, params=first.params, distributions=first.distributions)
    optuna.load_study(study_name="lq_search", storage=storage).add_trial(twin)
    result = run(model, 4, storage=storage)
    assert len(calls) == len(result.candidates) == 4
    assert [(t.number, t.user_attrs["repeats"]) for t in result.study.trials if t.state == TrialState.PRUNED] == [
        (3, 0)
    ]


def test_a_small_space_is_searched_once_through(model: DigitsCNN, monkeypatch: Any) -> None:
    original, calls = Evaluator.evaluate_layers, []
    monkeypatch.setattr(Evaluator, "evaluate_layers", lambda self, plans: calls.append(0) or original(self, plans))
    space = {
        "rules": [
            {"match": "head.2", "weight": ["int2", "int4", "int8"]},
            {"match": "stem.0", "weight": ["int3", "int5"]},
        ]
    }
    result = run(model, 20, space=space)
    assert len(calls) == len(result.candidates) == len({str(c.plan.to_dict()) for c in result.candidates}) == 6


def test_a_trial_prices_its_plan_once_and_surveys_no_model(model: DigitsCNN, monkeypatch: Any) -> None:
    price, survey, evaluate = evaluator_module.plan_cost, Survey.of.__func__, Evaluator.evaluate_layers
    priced: list[Any] = []
    surveys: list[nn.Module] = []
    before: list[int] = []

    def counted(network: nn.Module, plans: Any, *rest: Any) -> Any:
        priced.append(plans)
        return price(network, plans, *rest)

    def evaluated(self: Evaluator, plans: Any) -> Any:
        before.append(len(surveys))
        return evaluate(self, plans)

    monkeypatch.setattr(evaluator_module, "plan_cost", counted)
    monkeypatch.setattr(
        Survey,
        "of",
        classmethod(lambda cls, *args, **options: surveys.append(args[0]) or survey(cls, *args, **options)),
    )
    monkeypatch.setattr(Evaluator, "evaluate_layers", evaluated)
    # The surrogate prices each choice before the first trial.
    result = run(model, 3, uniform=False, sampler=tpe)
    assert len(result.study.trials) == len(before) == 3
    assert [str(plans) for plans in priced].count("{}") == 1, "the float model"
    assert len(priced) == 1 + 3
    assert before == [len(surveys)] * 3, "the model was surveyed before the trials"


def test_plans_that_cost_too_much_are_never_evaluated(model: DigitsCNN, monkeypatch: Any) -> None:
    original, seen = Evaluator.evaluate_layers, []

    def evaluate(self: Evaluator, plans: Any) -> Any:
        seen.append(self.cost(plans).quantizable_effective_bits)
        return original(self, plans)

    monkeypatch.setattr(Evaluator, "evaluate_layers", evaluate)
    result = run(model, 8, constraints=["quantizable_effective_bits <= 3.0", "val/acc >= 0.2"])
    assert len(seen) == 8
    assert max(seen) <= 3.0
    pruned = [t for t in result.study.trials if t.state == TrialState.PRUNED]
    assert {t.user_attrs["origin"] for t in pruned if "origin" in t.user_attrs} >= {"uniform 8 bits"}
    assert all(
        t.constraints["quantizable_effective_bits <= 3"] > 0
        and t.user_attrs["metrics"]["quantizable_effective_bits"] > 3.0
        for t in pruned
    )
    assert all(c.metric >= 0.2 for c in result.candidates), "the metric's bound is known after evaluation only"
    complete = [t for t in result.study.trials if t.state == TrialState.COMPLETE]
    assert all(t.constraints["val/acc >= 0.2"] == pytest.approx(0.2 - t.values[0]) for t in complete)


def test_constraints_that_cannot_be_kept_are_refused(model: DigitsCNN) -> None:
    with pytest.raises(
        QuantizationError, match=r"no plan of the space keeps 'quantizable_effective_bits <= 1': the smallest has 2\."
    ):
        run(model, 3, constraints="quantizable_effective_bits <= 1")
    with pytest.raises(
        QuantizationError, match=r"(?s)constraint 'bits <= 3'.*constraint 'val/ac >= 1'.*Did you mean 'val/acc'"
    ):
        run(model, 3, constraints=["bits <= 3", "val/ac >= 1"])
    with pytest.raises(QuantizationError, match=r"a constraint is written .*, got 'effective_bits < 3'"):
        run(model, 3, constraints=["effective_bits < 3"])


@pytest.mark.parametrize("cost", [None, ["effective_bits", "bops"]])
def test_one_objective_or_three(model: DigitsCNN, cost: Any) -> None:
    result = run(model, 8, cost=cost, constraints="quantizable_effective_bits <= 4")
    names = ["effective_bits", "bops"] if cost else []
    assert all(c.values == (c.metric, *(c.metrics[name] for name in names)) for c in result.candidates)
    assert len(result.study.directions) == 1 + len(names)
    for c in result.front:
        mine = [-c.metric, *(c.metrics[name] for name in names or ["effective_bits"])]
        for other in result.candidates:
            theirs = [-other.metric, *(other.metrics[name] for name in names or ["effective_bits"])]
            assert theirs == mine or any(m < t for m, t in zip(mine, theirs, strict=True)), "nobody beats it"
    assert result.best().metric == max(c.metric for c in result.candidates)


def test_a_study_of_something_else_is_refused_with_the_difference(model: DigitsCNN, storage: InMemoryStorage) -> None:
    run(model, 3, storage=storage)
    other = {**SPACE, "rules": [{"match": "stem.0", "weight": ["int8", "int4 per_channel mse", "int2 mse"]}]}
    with pytest.raises(
        StudyError, match=r"space stem\.0\.weight: only in the study int2 per_channel mse, .*; only now int8, int4"
    ):
        run(model, 5, storage=storage, space=other)
    with pytest.raises(StudyError, match="metric: val/acc in the study, val/loss now"):
        run(model, 5, storage=storage, metric="val/loss")
    with pytest.raises(StudyError, match="calibration batches: 1 in the study, 2 now"):
        run(model, 5, storage=storage, calibration_batches=2)
    with torch.no_grad():
        model.head[2].bias.add_(1e-3)
    with pytest.raises(StudyError, match="weights of the model"):
        run(model, 5, storage=storage)
    assert len(run(model, 3, storage=storage, study_name="another").candidates) == 3


def test_studies_of_other_programs_are_left_alone(storage: InMemoryStorage) -> None:
    optuna.create_study(study_name="theirs", storage=storage).add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StudyError, match="was not made by lq_plugin"):
        open_study("theirs", storage, ["minimize"], {})


def test_differences_are_named_one_by_one() -> None:
    assert differences({"a": {"b": [1, 2], "c": 1}, "d": 0}, {"a": {"b": [2, 1], "c": 2}, "e": 1}) == [
        "a b: order in the study [1, 2], now [2, 1]",
        "a c: 1 in the study, 2 now",
        "d: only in the study: 0",
        "e: only now: 1",
    ]


def test_an_unknown_metric_names_what_is_logged(model: DigitsCNN) -> None:
    with pytest.raises(
        QuantizationError, match=r"metric 'val/ac' is not logged .*: val/acc, val/loss\. Did you mean 'val/acc'"
    ):
        run(model, 3, metric="val/ac")
    with pytest.raises(QuantizationError, match=r"unknown cost 'bits'.*effective_bits"):
        run(model, 3, cost="bits")
    with pytest.raises(QuantizationError, match="mode is 'max' or 'min'"):
        run(model, 3, mode="maximum")


def test_samplers_come_as_an_object_or_are_made_from_a_seed(model: DigitsCNN) -> None:
    sampler = optuna.samplers.RandomSampler(seed=5)
    assert run(model, 4, sampler=sampler).study.sampler is sampler
    assert isinstance(run(model, 4, sampler=optuna.samplers.NSGAIISampler).study.sampler, optuna.samplers.NSGAIISampler)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed is an integer, 0 or more, 4294967295 at most, got -1"),
        ({"seed": 2**32}, "seed is an integer, 0 or more, 4294967295 at most"),
        ({"heartbeat": 0}, "heartbeat is an integer, 1 or more, got 0"),
        ({"heartbeat": 2.5}, "heartbeat is an integer, 1 or more, got 2.5"),
        (
            {"worker": -1, "seeds": "many"},
            r"2 faults(.|\n)*worker is an integer, 0 or more, got -1(.|\n)*seeds is an integer",
        ),
        ({"n_trials": True}, "n_trials is an integer, 0 or more, got True"),
        ({"max_failures": None}, "max_failures is an integer"),
        ({"sensitivity_batches": 0}, "sensitivity_batches is an integer, 1 or more"),
        ({"calibration_batches": 0}, "calibration_batches is an integer, 1 or more"),
        ({"promote_first": -1}, "promote_first is an integer, 0 or more"),
        ({"metric": None}, "metric is the name of a logged metric, got None"),
        ({"study_name": 3}, "study_name is a name, got 3"),
        ({"cost": 3}, "cost is a name, several names, or None, got 3"),
        ({"cost": [["bytes"]]}, "unknown cost"),
        ({"constraints": 3}, "constraints is a text or several, got 3"),
        ({"constraints": [3]}, "a constraint is written"),
        ({"latency": 3}, "latency is a mapping of options or None"),
        ({"latency": {"batch": "x"}}, "options of latency"),
        ({"fidelity": 3}, "fidelity is a list of rungs"),
        ({"pruner": 3}, "pruner"),
        ({"phases": 3}, "phases are a list, got 3"),
        ({"phases": [3]}, "a phase is a name or a mapping"),
        ({"storage": 3}, "storage is an Optuna storage, its URL, or None, got 3"),
        ({"storage": "study.db"}, "storage 'study.db' is no URL"),
        (
            {"storage": "postgresql://me:s3cret@host:port/db"},
            r"storage 'postgresql://me:\*\*\*@host:port/db' is no URL",
        ),
        ({"output_dir": 3}, "output_dir is a folder or None"),
        ({"sampler": 3}, "sampler is an Optuna sampler, or what makes one from a seed"),
        ({"trainer": 3}, "trainer is a class or function that makes a Trainer"),
        ({"dataloader": 3}, "dataloader is an iterable of batches or None"),
        ({"uniform": "yes"}, "uniform is true or false"),
        ({"progress": 1}, "progress is true or false"),
        ({"sensitivity": 3}, "unknown sensitivity measure 3"),
        ({"mode": ["max"]}, "mode is 'max' or 'min'"),
        ({"promote_within": "far"}, "promote_within is a number"),
        ({"space": 3}, "a Space is written as a mapping"),
    ],
    ids=str,
)
def test_bad_arguments_are_said_before_anything_is_done(
    model: DigitsCNN, monkeypatch: Any, given: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(Evaluator, "__init__", None)  # nothing is evaluated
    with pytest.raises(QuantizationError, match=message):
        run(model, **({"n_trials": 1} | given))


def test_plans_score_what_their_trials_did_also_where_the_loader_shuffles(model: DigitsCNN, tmp_path: Path) -> None:
    floats = copy.deepcopy(model.state_dict())
    # Per channel and per tensor: the search reads the data twice.
    space = SPACE | {"input": ["uint8 affine mse", "uint8 affine per_channel"]}
    result = run(model, 3, space=space, output_dir=tmp_path, seed=5)
    scores = []
    for seed in (5, None):
        for c in result.front:
            torch.manual_seed(1234)
            callback = PTQ(tmp_path / "plans" / c.file_name, calibration_batches=1, seed=seed)
            fresh = DigitsCNN(width=8)
            fresh.load_state_dict(floats)
            (found,) = quiet_trainer(callbacks=[callback]).validate(
                fresh, datamodule=DigitsDataModule(batch_size=120), verbose=False
            )
            scores.append(found["val/loss"])
    trials = [c.metrics["val/loss"] for c in result.front]
    assert scores[: len(trials)] == trials
    assert scores[len(trials) :] != trials, "another order, another range"


def test_the_first_signal_asks_and_the_second_one_raises() -> None:
    # In a process of its own, for a test runner may have plans of its own for SIGTERM.
    script = """
import signal
from lq_plugin.search.shared.interrupt import stop_on_signal
before = signal.getsignal(signal.SIGINT)
with stop_on_signal() as stop:
    assert not stop
    signal.raise_signal(signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        stop = None
assert stop is None and signal.getsignal(signal.SIGINT) is before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SIGTERM: the search stops after this trial; once more stops it at once" in done.stderr


def interrupted(function: str, call: int, signals: str, n_trials: int, folder: Path, options: str = "") -> None:
    """A search that gets signals in a process of its own, for a test runner may have plans of its own for them.

    They come at the given call of a method; the search must end with a KeyboardInterrupt and leave the handlers as they
    were.
    """
    script = f"""
import signal
from pathlib import Path
from lq_plugin.demo.digits import DigitsCNN
from lq_plugin.search import Evaluator
from tests.search.test_study import run
import torch

original, calls = {function}, []

def method(*args, **kwargs):
    calls.append(0)
    if len(calls) == {call}:
        for number in ({signals},):
            signal.raise_signal(number)
    return original(*args, **kwargs)

{function} = method
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may ignore it
before = signal.getsignal(signal.SIGTERM)
torch.manual_seed(0)
try:
    run(DigitsCNN(width=4), {n_trials}, output_dir=Path({str(folder)!r}), {options})
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.endswith("interrupted\n"), done.stderr


@pytest.mark.slow
def test_ctrl_c_finishes_the_trial_and_writes_what_there_is(tmp_path: Path) -> None:
    interrupted("Evaluator.evaluate_layers", 3, "signal.SIGINT", 20, tmp_path)
    study = optuna.load_study(study_name="lq_search", storage=f"sqlite:///{tmp_path}/study.db")
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    assert len(list((tmp_path / "plans").iterdir())) == len(
        list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    )


@pytest.mark.parametrize(
    "signals", [pytest.param("signal.SIGINT, signal.SIGINT", marks=pytest.mark.slow), "signal.SIGTERM"]
)
@pytest.mark.slow
def test_a_trial_that_is_given_up_is_taken_up_by_the_next_run(tmp_path: Path, signals: str) -> None:
    # In the loop of Lightning, which turns it into an exit.
    interrupted("DigitsCNN.validation_step", 15, signals, 8, tmp_path)
    trials = optuna.load_study(study_name="lq_search", storage=f"sqlite:///{tmp_path}/study.db").trials
    (lost,) = [t for t in trials if t.state == TrialState.FAIL]
    assert (tmp_path / "front.csv").exists()
    torch.manual_seed(0)
    result = run(DigitsCNN(width=4), 8, output_dir=tmp_path)
    (retried,) = [t for t in result.study.trials if t.user_attrs.get("retries") == lost.number]
    assert (retried.state, retried.params) == (TrialState.COMPLETE, lost.params)
    assert not [t for t in result.study.trials if t.state == TrialState.RUNNING]
    assert len(result.candidates) == 8


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "lightning", "optuna", "wandb")
    code = f"import sys, lq_plugin.commands.entry; print([m for m in {heavy} if m in sys.modules])"
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def test_the_fingerprint_is_plain(model: DigitsCNN) -> None:
    study = run(model, 3).study
    assert study.user_attrs[FINGERPRINT]["space"]["head.2.weight"] == [
        *("int2 per_channel mse", "int3 per_channel mse", "int8 per_channel mse", "int2 mse", "int3 mse", "int8 mse")
    ]
    assert Space.parse(SPACE) == Space(**SPACE)
