"""Workers that are killed, on real databases: nothing is lost, nothing runs twice, nothing stays running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from filelock import FileLock, Timeout
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lq_plugin.search import StudyError
from lq_plugin.search.shared.database import rdb_storage
from lq_plugin.search.shared.storage import open_study

from .server import Server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        request.getfixturevalue("server").url if request.param == "postgresql" else f"sqlite:///{tmp_path / 'study.db'}"
    )


class Worker:
    """A process, and what it prints."""

    def __init__(self, folder: Path, url: str, n_trials: int, number: int, seconds: float, *hang: int) -> None:
        self.output = folder / f"{number}_{time.monotonic_ns()}.log"
        command = [
            sys.executable,
            "-m",
            "tests.search.worker",
            url,
            str(n_trials),
            str(number),
            str(seconds),
            *map(str, hang),
        ]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
            )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        assert self.process.wait(timeout=180) == 0, self.output.read_text()


def trials(url: str, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    storage = RDBStorage(url)
    try:
        return optuna.load_study(study_name="lq_search", storage=storage).get_trials(
            deepcopy=False, states=states or None
        )
    except KeyError:
        return []
    finally:
        # Asked ten times a second: PostgreSQL has a hundred connections.
        storage.remove_session()
        storage.engine.dispose()


def wait_for(url: str, state: TrialState, count: int, *workers: Worker) -> None:
    until = time.monotonic() + 120
    while len(trials(url, state)) < count:
        assert time.monotonic() < until, "nothing happens"
        for worker in workers:
            assert worker.process.poll() is None, worker.output.read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(url: str, tmp_path: Path) -> None:
    first, second = Worker(tmp_path, url, 14, 0, 0.1, 2), Worker(tmp_path, url, 14, 1, 0.1)
    # The other one does all the rest, and waits for the trial that hangs.
    wait_for(url, TrialState.COMPLETE, 13, first, second)
    (running,) = trials(url, TrialState.RUNNING)
    first.kill()
    second.finish()
    assert not trials(url, TrialState.RUNNING)
    (failed,) = trials(url, TrialState.FAIL)
    assert failed.number == running.number
    complete = trials(url, TrialState.COMPLETE)
    assert len(complete) == 14
    assert len({frozenset(trial.params.items()) for trial in complete}) == 14, "each plan once"
    retried = [trial for trial in complete if trial.system_attrs.get("retry_history")]
    assert [trial.system_attrs["retry_history"] for trial in retried] == [[failed.number]]
    assert retried[0].params == failed.params
    assert retried[0].user_attrs["plan"] == failed.user_attrs["plan"]


@pytest.mark.slow
def test_the_same_command_again_goes_on(url: str, tmp_path: Path) -> None:
    """After a kill of the only worker, and with nothing left to do."""
    name = "lq_search"
    for study in optuna.get_all_study_names(url):
        optuna.delete_study(study_name=study, storage=url)
    worker = Worker(tmp_path, url, 12, 0, 0.3)
    wait_for(url, TrialState.COMPLETE, 3, worker)
    worker.kill()
    for _ in range(2):
        Worker(tmp_path, url, 12, 0, 0.0).finish()
        complete = trials(url, TrialState.COMPLETE)
        assert len(complete) == 12
        assert len({frozenset(trial.params.items()) for trial in complete}) == 12
        assert not trials(url, TrialState.RUNNING)
    assert optuna.get_all_study_names(url) == [name]


@pytest.mark.slow
def test_workers_outlive_a_restart_of_the_server(server: Server, tmp_path: Path) -> None:
    for study in optuna.get_all_study_names(server.url):
        optuna.delete_study(study_name=study, storage=server.url)
    workers = [Worker(tmp_path, server.url, 14, number, 0.5) for number in range(2)]
    wait_for(server.url, TrialState.COMPLETE, 3, *workers)
    server.cut_connections()
    wait_for(server.url, TrialState.COMPLETE, 6, *workers)
    server.stop()
    # Longer than the grace time of three seconds: the trials may have been taken for dead.
    time.sleep(5)
    server.start()
    for worker in workers:
        worker.finish()
    complete = trials(server.url, TrialState.COMPLETE)
    assert len({frozenset(trial.params.items()) for trial in complete}) == len(complete)
    assert len(complete) == 14
    assert not trials(server.url, TrialState.RUNNING)


def test_a_database_that_is_not_there_is_named() -> None:
    with pytest.raises(
        StudyError, match=r"cannot open the storage postgresql\+psycopg2://me:\*\*\*@127.0.0.1:1/none: "
    ):
        rdb_storage("postgresql+psycopg2://me:secret@127.0.0.1:1/none")


def test_storages_without_heartbeat_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
    study = open_study("s", optuna.storages.JournalStorage(backend), ["maximize"], {})
    assert "JournalStorage has no heartbeat: the trial of a killed worker stays RUNNING" in caplog.text
    assert len(study.trials) == 0


def test_a_waiting_trial_goes_to_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite knows no row locks: two that read at once that a trial waits would both get it."""
    original, held = RDBStorage.set_trial_state_values, []

    def taking(self, trial_id, state, values=None):
        try:
            with FileLock(f"{tmp_path / 'study.db'}.trial.lock", timeout=0):
                held.append((state, False))
        except Timeout:
            held.append((state, True))
        return original(self, trial_id, state, values)

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", taking)
    study = open_study("s", f"sqlite:///{tmp_path / 'study.db'}", ["maximize"], {})
    study.enqueue_trial({"x": 1})
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert held == [(TrialState.RUNNING, True), (TrialState.COMPLETE, False)]
