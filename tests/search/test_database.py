"""Shared storages: servers that go away, trials that nobody works on, workers that stand still, and what a waiting
worker says."""

import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import OperationalError, PendingRollbackError, ProgrammingError

from lq_plugin.demo.digits import DigitsCNN
from lq_plugin.search import Evaluator, Objective, StudyError
from lq_plugin.search.shared import database as database_module, others as others_module
from lq_plugin.search.shared.database import alone, quiet, rdb_storage
from lq_plugin.search.shared.others import OtherWorkers
from lq_plugin.search.shared.storage import open_study

from .server import Server
from .test_study import run
from .test_sweep import Sweeps, X, parabola

COMPLETE, FAIL, RUNNING, WAITING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def sweeps(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time as the storage sees it: what it sleeps is over at once."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    for module in (database_module, others_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def ask(study: optuna.Study) -> optuna.Trial:
    """A trial of the next number; the signs of life are ours to give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        return study.ask()


def lost_trial(url: str, study: str) -> None:
    """Leaves a trial as a worker does that is killed between taking it and its first sign of life."""
    with quiet():
        storage = RDBStorage(url)
        known = optuna.load_study(study_name=study, storage=storage)
        (waiting, *_) = known.get_trials(states=(WAITING,))
        storage.set_trial_state_values(waiting._trial_id, RUNNING)
        storage.remove_session()
        storage.engine.dispose()


@pytest.mark.parametrize("given", ["url", "object"])
def test_a_trial_that_never_gave_a_sign_of_life_is_tried_again(url: str, given: str, clock: SimpleNamespace) -> None:
    with quiet():
        callback = optuna.storages.RetryHeartbeatStaleTrialCallback()
        options: dict[str, Any] = {
            "heartbeat_interval": 2,
            "grace_period": 6,
            "heartbeat_stale_trial_callback": callback,
        }
        storage = url if given == "url" else RDBStorage(url, **options)
    study = open_study("s", storage, ["maximize"], {}, heartbeat=2)
    study.enqueue_trial({"x": 0.25})
    lost_trial(url, "s")
    others = OtherWorkers(study)
    started = clock.now
    while clock.now <= started + 6:
        others.wait()
        (trial,) = study.get_trials(deepcopy=False)
        assert trial.state == RUNNING, "its worker may be slow"
    others.wait()
    failed, again = study.get_trials(deepcopy=False)
    assert (failed.state, again.state) == (FAIL, WAITING)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert study.trials[1].value == 0.25


@pytest.mark.slow
def test_a_search_goes_on_after_a_worker_that_took_a_trial_and_was_killed(
    model: DigitsCNN, url: str, caplog: Any
) -> None:
    run(model, 1, storage=url, study_name="s", heartbeat=1)
    lost_trial(url, "s")
    result = run(model, 3, storage=url, study_name="s", heartbeat=1)
    assert len(result.study.get_trials(states=(COMPLETE,))) == 3
    assert len(result.study.get_trials(states=(FAIL,))) == 1
    assert not result.study.get_trials(states=(RUNNING,))
    assert [c.origin for c in result.candidates] == [f"uniform {bits} bits" for bits in (2, 8, 3)], (
        "also the one that was lost"
    )


def test_a_waiting_worker_says_what_it_waits_for(url: str, clock: SimpleNamespace, caplog: Any) -> None:
    study = open_study("s", url, ["maximize"], {}, heartbeat=10)
    study.add_trial(create_trial(value=1.0))
    trial = ask(study)
    others = OtherWorkers(study)
    for _ in range(300):  # 150 seconds
        study._storage.record_heartbeat(trial._trial_id)
        others.wait()
    said = [record.message for record in caplog.records]
    assert said == ["waiting for trials 1 of other workers; one without a sign of life (every 10 s) is tried again"] * 3


def test_a_process_that_waits_for_a_lock_says_so(tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_SILENCE", 0.1)
    path = tmp_path / "float.ckpt.lock"
    held = threading.Event()

    def hold() -> None:
        with FileLock(path):
            held.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(5)
    with alone(path, "the float model"):
        pass
    other.join()
    assert caplog.messages == [f"waiting for the float model, which another process is making (it holds {path})"]


def take_away(url: str, study: str, number: int) -> None:
    """Fails a trial that gave no sign of life and puts its plan back into the queue, as another worker does."""
    with quiet():
        storage = RDBStorage(url)
        known = optuna.load_study(study_name=study, storage=storage)
        trial: FrozenTrial = known.trials[number]
        storage.set_trial_state_values(trial._trial_id, FAIL)
        optuna.storages.RetryHeartbeatStaleTrialCallback()(known, trial)
        storage.remove_session()
        storage.engine.dispose()


def test_a_worker_that_stood_still_goes_on_with_other_trials(
    model: DigitsCNN, url: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    original, calls = Evaluator.evaluate_layers, []

    def stands_still(self: Evaluator, plans: Any) -> Any:
        calls.append(plans)
        if len(calls) == 3:
            take_away(url, "s", 2)
        return original(self, plans)

    monkeypatch.setattr(Evaluator, "evaluate_layers", stands_still)
    result = run(model, 5, storage=url, study_name="s", max_failures=0)
    assert len(result.candidates) == 5
    (failed,) = result.study.get_trials(states=(FAIL,))
    assert failed.number == 2
    (again,) = [c for c in result.candidates if c.plan.to_dict() == failed.user_attrs["plan"]]
    assert again.number > 2
    assert "trial 2 was taken from it: it is tried again" in caplog.text


def test_a_trial_taken_away_before_its_value_is_told_does_not_end_the_worker(
    model: DigitsCNN, url: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    original = Objective.__call__

    def evaluated_late(self: Objective, trial: Any) -> Any:
        values = original(self, trial)
        if trial.number == 2:
            take_away(url, "s", 2)
        return values

    monkeypatch.setattr(Objective, "__call__", evaluated_late)
    result = run(model, 5, storage=url, study_name="s", max_failures=0)
    assert len(result.candidates) == 5
    assert [trial.number for trial in result.study.get_trials(states=(FAIL,))] == [2]
    assert "trial 2 was taken from it: it is tried again" in caplog.text


def test_a_job_of_a_sweep_that_stood_still_is_no_failure(sweeps: Sweeps, caplog: Any) -> None:
    ran = []

    def task(cfg: dict[str, str]) -> float:
        ran.append(cfg["x"])
        if len(ran) == 2:
            take_away(f"sqlite:///{sweeps.folder / 'study.db'}", "lq_sweep", 1)
        return parabola(cfg)

    sweeps(task, params=X, n_trials=3, max_failures=0)
    assert len(sweeps.trials(COMPLETE)) == 3
    assert [trial.number for trial in sweeps.trials(FAIL)] == [1]
    assert ran.count(ran[1]) == 2, "it is tried again"
    assert "trial 1 was taken from it" in caplog.text


def test_a_sweep_tries_a_trial_again_whose_process_never_gave_a_sign_of_life(sweeps: Sweeps) -> None:
    sweeps(parabola, params=X, n_trials=1)
    storage = f"sqlite:///{sweeps.folder / 'study.db'}"
    with quiet():
        optuna.load_study(study_name="lq_sweep", storage=storage).enqueue_trial({"x": 0.25})
    lost_trial(storage, "lq_sweep")
    sweeps(parabola, params=X, n_trials=3)
    assert len(sweeps.trials(COMPLETE)) == 3
    assert len(sweeps.trials(FAIL)) == 1
    assert not sweeps.trials(RUNNING)
    assert 0.25 in [trial.params["x"] for trial in sweeps.trials(COMPLETE)]


def test_a_server_that_restarts_or_cuts_connections_is_asked_again(server: Server, caplog: Any) -> None:
    study = open_study("restarted", server.url, ["maximize"], {})
    study.add_trial(create_trial(value=1.0))
    server.cut_connections()
    study.set_user_attr("cut", True)
    server.stop()
    back = threading.Timer(1.5, server.start)
    back.start()
    study.tell(ask(study), 2.0)
    back.join()
    assert "does not answer, next attempt in 0.5 s" in caplog.text
    found = optuna.load_study(study_name="restarted", storage=server.url)
    assert [trial.value for trial in found.trials if trial.state == COMPLETE] == [1.0, 2.0]
    assert found.user_attrs["cut"] is True


def test_a_commit_whose_answer_was_lost_is_no_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study("answer", server.url, ["maximize"], {})
    trial, plain, lost = ask(study), RDBStorage.set_trial_state_values, []

    def carried_out(self: RDBStorage, *arguments: Any) -> bool:
        done = plain(self, *arguments)
        if not lost:
            lost.append(done)
            raise StorageInternalError from OperationalError(
                "commit", {}, Exception("the server closed the connection")
            )
        return done

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", carried_out)
    study.tell(trial, 3.0)
    assert study.trials[0].value == 3.0
    assert lost == [True]


def test_a_server_that_stays_away_is_an_error_with_its_url(server: Server, clock: SimpleNamespace) -> None:
    storage = rdb_storage(server.url)
    server.stop()
    try:
        with pytest.raises(StudyError, match=r"the storage postgresql.* failed: .*(No such file|refused)"):
            storage.get_all_studies()
        gave_up = clock.now
        assert 1600 < gave_up < 1660, "ten minutes"
        with pytest.raises(StudyError, match="failed"):
            storage.get_all_studies()
        assert clock.now == gave_up, "not ten minutes for each call"
    finally:
        server.start()


class _Driver(Exception):
    """Error that a database driver raises."""


@pytest.mark.parametrize("wrapped", [False, True], ids=["direct", "after a second query"])
def test_a_lost_connection_is_asked_again(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = OperationalError("SELECT 1", {}, _Driver("server closed the connection"))
    answers: list[Any] = []

    def ask(storage: Any) -> int:
        answers.append(storage)
        if len(answers) > 1:
            return 7
        try:
            raise lost
        except OperationalError as error:
            if not wrapped:
                raise StorageInternalError("no commit") from error
            try:
                raise PendingRollbackError("Can't reconnect until invalid transaction is rolled back")
            except PendingRollbackError as again:
                raise StorageInternalError("no commit") from again

    class Storage:
        url = "postgresql://host/name"
        _away_since = None

    monkeypatch.setattr(database_module, "_FIRST_PAUSE", 0.0)
    assert database_module._outlasting(ask)(Storage()) == 7
    assert len(answers) == 2


def test_an_error_of_another_kind_is_told_at_once() -> None:
    def ask(storage: Any) -> None:
        raise StorageInternalError("no commit") from ProgrammingError("SELECT 1", {}, _Driver("no such column"))

    class Storage:
        url = "postgresql://host/name"
        _away_since = None

    with pytest.raises(StudyError, match="failed: no such column"):
        database_module._outlasting(ask)(Storage())
