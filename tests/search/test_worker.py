"""A worker's steps one by one, and what it is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.search import SearchConfig, Space
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.shared.interrupt import StopRequest
from lq_plugin.search.study.worker import StudyWorker

from .conftest import CPU

SPACE = {"weight": ["int2 mse", "int4 mse", "int8 mse"]}


def config(model: DigitsCNN, **options: Any) -> SearchConfig:
    given = {"metric": "val/acc", "trainer": CPU, "calibration_batches": 1, "progress": False, "seeds": 0}
    return SearchConfig(model, DigitsDataModule(batch_size=120), SPACE, **(given | options))


def test_a_config_is_read_once_and_cannot_be_changed(model: DigitsCNN) -> None:
    read = config(model, cost=["bytes", "bops"], constraints="bytes <= 900", fidelity=[{"batches": 1}, {}], mode="min")
    assert (read.costs, read.size, read.directions) == (("bytes", "bops"), "bytes", ["minimize"] * 3)
    assert [str(limit) for limit in read.limits] == ["bytes <= 900"]
    assert [str(rung) for rung in read.rungs] == ["batches=1", "PTQ"]
    assert isinstance(read.space, Space)
    assert read.timing is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.n_trials = 3  # type: ignore[misc]
    again = dataclasses.replace(read, cost=None, n_trials=7)
    assert (again.n_trials, again.costs, again.size, again.directions) == (7, (), "effective_bits", ["minimize"])
    with pytest.raises(QuantizationError, match=r"2 faults(.|\n)*n_trials is an integer(.|\n)*unknown cost 'bit'"):
        dataclasses.replace(read, n_trials=-1, cost="bit")


def test_a_config_shows_no_password(model: DigitsCNN) -> None:
    assert "s3cret" not in repr(config(model, storage="postgresql://me:s3cret@host/db"))


def test_a_study_is_seeded_once_and_works_on_step_by_step(model: DigitsCNN, monkeypatch: Any) -> None:
    evaluate, evaluated = Evaluator.evaluate_layers, []
    monkeypatch.setattr(
        Evaluator, "evaluate_layers", lambda self, plans: evaluated.append(plans) or evaluate(self, plans)
    )
    storage = InMemoryStorage()
    worker = StudyWorker(config(model, n_trials=2, storage=storage))
    with worker.evaluator:
        worker.open()
        assert worker.study.get_trials() == []
        worker.seed()
        origins = [trial.user_attrs["origin"] for trial in worker.study.get_trials(states=(TrialState.WAITING,))]
        assert origins == ["uniform 2 bits", "uniform 4 bits", "uniform 8 bits"]
        worker.seed()
        assert len(worker.study.get_trials()) == 3, "the second worker finds them there"
        assert evaluated == []
        worker.run(StopRequest())
        worker.finish()
    assert len(evaluated) == len(worker.result().candidates) == 2
    assert worker.study.sampler is worker.sampler
