"""Schedules are pure functions of epoch and step."""

import pytest

from lq_plugin import PlanError, Schedule
from lq_plugin.intent.schedule import Switches


def test_phases_follow_epoch_and_step():
    schedule = Schedule(
        weights_start="step 5", activations_start="epoch 2", observer_freeze="step 20", batch_norm_freeze=30
    )
    assert schedule.at(0, 4) == Switches(weights=False, activations=False, observe=True, freeze_batch_norm=False)
    assert schedule.at(0, 5) == Switches(weights=True, activations=False, observe=True, freeze_batch_norm=False)
    assert schedule.at(2, 19) == Switches(weights=True, activations=True, observe=True, freeze_batch_norm=False)
    assert schedule.at(2, 30) == Switches(weights=True, activations=True, observe=False, freeze_batch_norm=True)


def test_default_quantizes_at_once_and_never_freezes():
    assert Schedule().at(0, 0) == Schedule().at(10**6, 10**9) == Switches(True, True, True, False)


def test_only_differences_are_written():
    assert Schedule().to_dict() == {}
    schedule = Schedule(activations_start="epoch 1")
    assert schedule.to_dict() == {"activations_start": "epoch 1"}
    assert Schedule.parse(schedule.to_dict()) == schedule


def test_faults_are_listed():
    with pytest.raises(PlanError) as caught:
        Schedule(weights_start=-1, observer_freeze="later")
    assert "weights_start" in str(caught.value)
    assert "observer_freeze" in str(caught.value)
    with pytest.raises(PlanError, match="Did you mean 'weights_start'"):
        Schedule.parse({"weight_start": 1})
