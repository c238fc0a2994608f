"""Databases that several workers share, which survive an absent server and workers that are killed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from filelock import FileLock, Timeout
from optuna import Study
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._rdb.models import TrialModel
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import TrialState
from sqlalchemy import event, text
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from lq_plugin.errors import QuantizationError
from lq_plugin.utilities.files import make_folder
from lq_plugin.utilities.passwords import masked, passwords_in, without

log = logging.getLogger(__name__)

#: Seconds between signs of life of a running trial.
HEARTBEAT = 10
#: Seconds after which a server that does not answer is given up.
_PATIENCE = 600.0
#: Seconds between two attempts to reach it, at first and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
#: Seconds that a process waits for another one before it says so.
_SILENCE = 5.0
#: Seconds between two attempts to get a lock of a server.
_POLL = 0.1


class StudyError(QuantizationError):
    """A study that cannot continue: it has another request, too many trials failed, or its storage does not answer."""


def _lost_connection(error: BaseException | None) -> DBAPIError | None:
    """Returns the driver's error in the chain that led to `error`; None where another one is its cause.

    Not its direct cause alone: Optuna takes one in `_get_trials` for too many SQL variables and asks again on a session
    that SQLAlchemy then refuses with a `PendingRollbackError`.
    """
    while error is not None and not isinstance(error, OperationalError | InterfaceError):
        error = error.__cause__ or error.__context__
    return error


def _outlasting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a storage's method that is repeated while its server is away."""

    @functools.wraps(method)
    def call(self: SharedStorage, *args: Any, **kwargs: Any) -> Any:
        pause = _FIRST_PAUSE
        while True:
            try:
                result = method(self, *args, **kwargs)
                self._away_since = None
                return result
            except StorageInternalError as error:
                lost = _lost_connection(error)
                first = lost or error.__cause__ or error
                # What the driver says, without the statement that SQLAlchemy adds.
                cause = without(str(getattr(first, "orig", None) or first), passwords_in(self.url))
                away = sqlite_file(self.url) is None and lost is not None
                # Counted over all calls: a worker that gives up makes several more, which shall not wait again.
                self._away_since = self._away_since or time.monotonic()
                if not away or time.monotonic() - self._away_since > _PATIENCE:
                    raise StudyError(f"the storage {shown(self.url)} failed: {cause}") from error
                log.warning("the storage %s does not answer, next attempt in %.3g s: %s", shown(self.url), pause, cause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    return call


class SharedStorage(RDBStorage):
    """Optuna's storage, for workers that may be killed, stand still, or lose their connection.

    * A server that is restarted, or that cut the connection, is asked again, with growing pauses.
    * A trial that runs without ever having given a sign of life is stale after the grace period, counted from when this
      process saw it first: clocks of machines differ. Its worker was killed between taking it and its first heartbeat;
      Optuna waits forever.
    * Each waiting trial goes to one process, and one process fails a stale one: SQLite knows no row locks.
    """

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        #: Trials that run without a sign of life, and since when.
        self._silent: dict[int, float] = {}
        #: Since when the server has not answered.
        self._away_since: float | None = None

    @classmethod
    def of(cls, storage: BaseStorage) -> BaseStorage:
        """Returns the same database with the same settings, where it is one of Optuna's own; else `storage`."""
        if type(storage) is not RDBStorage:
            return storage
        same = cls.__new__(cls)
        same.__dict__.update(storage.__dict__, _silent={}, _away_since=None)
        return same

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        attempts = itertools.count()

        @_outlasting
        def change(self: SharedStorage) -> bool:
            again = next(attempts) > 0
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                # Of a lost connection the last commit may have been carried out.
                found = self.get_trial(trial_id)
                if again and (found.state, found.values) == (state, None if values is None else list(values)):
                    return True
                raise

        file = sqlite_file(self.url) if state in (TrialState.RUNNING, TrialState.FAIL) else None
        with contextlib.nullcontext() if file is None else FileLock(f"{file}.trial.lock"):
            found: bool = change(self)
            return found

    @contextlib.contextmanager
    def alone(self, study_id: int) -> Iterator[None]:
        """Lets one process at a time in: with SQLite by a file, with PostgreSQL by a lock of the server.

        One that stands still inside is waited for no longer than until its trials count as killed.
        """
        patience = self.grace_period or 0
        with contextlib.ExitStack() as stack:
            if (file := sqlite_file(self.url)) is not None:
                with contextlib.suppress(Timeout):
                    stack.enter_context(FileLock(f"{file}.turn.lock").acquire(timeout=patience))
            elif self.engine.dialect.name == "postgresql":
                stack.callback(_close, self._server_lock(study_id, patience))
            yield

    @_outlasting
    def _server_lock(self, study_id: int, patience: float) -> Connection:
        """Returns a connection that holds a lock until it is closed."""
        until = time.monotonic() + patience
        asking = text("SELECT pg_try_advisory_xact_lock(hashtext('lq_plugin'), :study)")
        try:
            connection = self.engine.connect()
            while not connection.execute(asking, {"study": study_id}).scalar() and time.monotonic() < until:
                time.sleep(_POLL)
        except DBAPIError as error:
            raise StorageInternalError("no lock") from error
        return connection

    @_outlasting
    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        assert self.heartbeat_interval is not None
        with _create_scoped_session(self.scoped_session) as session:
            running = session.query(TrialModel.trial_id).filter(
                TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING
            )
            silent = [trial_id for (trial_id,) in running.filter(~TrialModel.heartbeats.any())]
        now = time.monotonic()
        self._silent = {trial_id: self._silent.get(trial_id, now) for trial_id in silent}
        grace = self.grace_period or 2 * self.heartbeat_interval
        lost = [trial_id for trial_id, since in self._silent.items() if now - since > grace]
        return [*super()._get_stale_trial_ids(study_id), *lost]


for _name in (
    "create_new_study", "delete_study", "get_all_studies", "get_study_id_from_name", "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs", "set_study_user_attr", "get_study_system_attrs", "set_study_system_attr",
    "_create_new_trial", "get_trial", "_get_trials", "get_trial_id_from_study_id_trial_number", "_get_best_trial_id",
    "_set_trial_param", "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr",
    "record_heartbeat",
):  # fmt: skip
    setattr(SharedStorage, _name, _outlasting(getattr(RDBStorage, _name)))


def rdb_storage(url: str, heartbeat: int = HEARTBEAT) -> SharedStorage:
    """Returns a database with a heartbeat: a trial that is silent for three beats has failed and is tried again.

    SQLite waits for other processes and writes ahead: with the write-ahead log a transaction costs a third; a loss of
    power (not of the process) can take the last trials with it.

    Raises:
        StudyError: the database cannot be reached, or its driver is not installed.
    """
    with quiet():
        options: dict[str, Any] = {
            "heartbeat_interval": heartbeat,
            "grace_period": 3 * heartbeat,
            "heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback(max_retry=3),
        }
    file = sqlite_file(url)
    if file is None:
        # A connection that the server has closed is opened anew.
        return _connect(url, {"pool_pre_ping": True}, options)
    make_folder(file.parent)
    storage = _connect(url, {"connect_args": {"timeout": 100}}, options)

    @event.listens_for(storage.engine, "connect")
    def write_ahead(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.engine.dispose()
    return storage


def _connect(url: str, engine: dict[str, Any], options: dict[str, Any]) -> SharedStorage:
    for attempt in itertools.count():
        try:
            with quiet():
                return SharedStorage(url, engine_kwargs=engine, **options)
        except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError, ValueError) as error:
            # Two workers that make the tables of a new database at once: one of them is refused, and finds them then.
            if attempt == 2 or not isinstance(error, DBAPIError | StorageInternalError) or sqlite_file(url) is not None:
                raise StudyError(
                    f"cannot open the storage {shown(url)}: {without(str(error), passwords_in(url))}"
                ) from error
            time.sleep(1.0 + attempt)
    raise AssertionError


@contextlib.contextmanager
def locked(storage: BaseStorage | str | None) -> Iterator[None]:
    """A context for one process at a time, where the storage is a SQLite file: two must not make its tables at once."""
    file = sqlite_file(storage)
    if file is None:
        yield
        return
    make_folder(file.parent)
    with alone(f"{file}.lock", f"the study's first plans, or a measurement, in {file}"):
        yield


@contextlib.contextmanager
def alone(path: str | Path, what: str) -> Iterator[None]:
    """A context for one process at a time; a second one waits until the first has left it, and says for what.

    Args:
        path: of the lock.
        what: what the first one is making.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_SILENCE)
    except Timeout:
        log.warning("waiting for %s, which another process is making (it holds %s)", what, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _close(connection: Connection) -> None:
    with contextlib.suppress(DBAPIError):  # the server is away, and the lock has gone with it
        connection.close()


def alone_with(study: Study) -> contextlib.AbstractContextManager[None]:
    """Lets one process at a time in, where the study's storage can do that."""
    storage = study._storage
    backend = getattr(storage, "_backend", storage)  # under Optuna's cache
    return backend.alone(study._study_id) if isinstance(backend, SharedStorage) else contextlib.nullcontext()


def has_heartbeat(storage: BaseStorage | None) -> bool:
    """Returns whether the trials of a killed worker are noticed and tried again."""
    interval = getattr(storage, "get_heartbeat_interval", None)
    return interval is not None and interval() is not None


def sqlite_file(storage: BaseStorage | str | None) -> Path | None:
    """Returns the file of an SQLite database; None for other storages, and in memory."""
    if not isinstance(storage, str) or not storage.startswith("sqlite"):
        return None
    database = make_url(storage).database or ":memory:"
    if database.startswith("file:"):
        database = urlsplit(database).path
    return None if database == ":memory:" or "mode=memory" in storage else Path(database)


def shown(url: str) -> str:
    """Returns a storage's URL without its password."""
    return str(masked(url))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without Optuna's line for each trial and without its warnings about experimental parts."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
