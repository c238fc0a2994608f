"""Workers of one study take their trials one after another: there are never more than asked for."""

import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lq_plugin.search.shared.database import alone_with
from lq_plugin.search.shared.storage import open_study


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("server").url if request.param == "postgresql" else f"sqlite:///{tmp_path / 's.db'}"


def test_one_worker_at_a_time_is_inside(url: str) -> None:
    inside: list[str] = []

    def take(name: str, study: optuna.Study) -> None:
        with alone_with(study):
            inside.append(f"{name} in")
            time.sleep(0.3)
            inside.append(f"{name} out")

    studies = [open_study("turn", url, ["maximize"], {}, heartbeat=1) for _ in range(2)]
    threads = [threading.Thread(target=take, args=pair) for pair in zip("ab", studies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside in (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])


def test_a_worker_that_stands_still_inside_is_not_waited_for_longer_than_the_grace_time(url: str) -> None:
    first, second = (open_study("turn", url, ["maximize"], {}, heartbeat=1) for _ in range(2))
    started = time.monotonic()
    with alone_with(first), alone_with(second):
        assert 2.5 < time.monotonic() - started < 10
    assert not second.get_trials(states=(TrialState.RUNNING,))
