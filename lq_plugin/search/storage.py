"""Open a study so that several processes can share it, and refuse one that asks for something else."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from lq_plugin.errors import QuantizationError
from lq_plugin.files import make_folder

log = logging.getLogger(__name__)

#: User attribute of a study: what its trials have in common.
FINGERPRINT = "lq_plugin"
#: Seconds between signs of life of a running trial.
HEARTBEAT = 10
_SHOWN = 10


class StudyError(QuantizationError):
    """A study that cannot go on: it was made for something else, or too many of its trials failed."""


def open_study(
    name: str,
    storage: BaseStorage | str | None,
    directions: list[Any],
    fingerprint: Mapping[str, Any],
    heartbeat: int = HEARTBEAT,
) -> Study:
    """The study `name` in `storage`, new or with all its trials.

    Args:
        name: names the study in its storage.
        storage: an Optuna storage or its URL; None keeps the study in memory.
        directions: one for each objective.
        fingerprint: nested mappings of plain values; trials may only be compared where these are equal.
        heartbeat: seconds between signs of life of a running trial, for a storage given by its URL.

    Raises:
        StudyError: naming each difference to the study that is there.
    """
    with locked(storage):
        opened = rdb_storage(storage, heartbeat) if isinstance(storage, str) else storage
        with quiet():
            study = optuna.create_study(study_name=name, storage=opened, directions=directions, load_if_exists=True)
        if not (isinstance(opened, InMemoryStorage | None) or has_heartbeat(opened)):
            log.warning(
                "%s has no heartbeat: the trial of a killed worker stays RUNNING and is not tried again. SQLite and PostgreSQL have one",
                type(opened).__name__,
            )
        known = study.user_attrs.get(FINGERPRINT)
        if known is None and study.get_trials(deepcopy=False):
            raise StudyError(f"study {name!r} was not made by lq_plugin; choose another study name")
        if known is None:
            study.set_user_attr(FINGERPRINT, dict(fingerprint))
        elif faults := differences(known, fingerprint):
            more = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
            listing = "\n".join(f"  - {fault}" for fault in faults[:_SHOWN] + more)
            raise StudyError(
                f"study {name!r} was made for something else, and its trials cannot be compared with new ones:\n{listing}\n"
                "  choose another study name, or go back to what the study was made for"
            )
    return study


def has_heartbeat(storage: BaseStorage | None) -> bool:
    """Whether the trials of a killed worker are noticed, and tried again."""
    interval = getattr(storage, "get_heartbeat_interval", None)
    return interval is not None and interval() is not None


def rdb_storage(url: str, heartbeat: int = HEARTBEAT) -> RDBStorage:
    """A database whose running trials give signs of life; one that is silent for three of them has failed and is tried again.

    SQLite waits for other processes and writes ahead: with the write-ahead log a transaction costs a third; a loss of power
    (not of the process) can take the last trials with it.

    Raises:
        StudyError: the database cannot be reached, or its driver is not installed.
    """
    with quiet():
        options: dict[str, Any] = {
            "heartbeat_interval": heartbeat,
            "grace_period": 3 * heartbeat,
            "heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback(max_retry=3),
        }
    file = _sqlite_file(url)
    if file is None:
        return _connect(url, options)
    make_folder(file.parent)
    with quiet():
        storage = _SQLiteStorage(url, engine_kwargs={"connect_args": {"timeout": 100}}, **options)

    @event.listens_for(storage.engine, "connect")
    def write_ahead(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.engine.dispose()
    return storage


class _SQLiteStorage(RDBStorage):
    """Each waiting trial goes to one process: SQLite knows no row locks, so that two that ask at once could both get it."""

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        file = _sqlite_file(self.url)
        taking = FileLock(f"{file}.trial.lock") if state == TrialState.RUNNING and file is not None else contextlib.nullcontext()
        with taking:
            return super().set_trial_state_values(trial_id, state, values)


def _connect(url: str, options: dict[str, Any]) -> RDBStorage:
    for attempt in itertools.count():
        try:
            with quiet():
                # A connection that the server has closed is opened anew.
                return RDBStorage(url, engine_kwargs={"pool_pre_ping": True}, **options)
        except (SQLAlchemyError, ImportError) as error:
            # Two workers that make the tables of a new database at once: one of them is refused, and finds them then.
            if attempt == 2 or isinstance(error, ImportError):
                raise StudyError(f"cannot open the storage {make_url(url).render_as_string()}: {error}") from error
            time.sleep(1.0 + attempt)
    raise AssertionError


@contextlib.contextmanager
def locked(storage: BaseStorage | str | None) -> Iterator[None]:
    """One process at a time: two that make the tables of a new SQLite file at once get in each other's way."""
    file = _sqlite_file(storage)
    if file is None:
        yield
        return
    make_folder(file.parent)
    with FileLock(f"{file}.lock"):
        yield


def _sqlite_file(storage: BaseStorage | str | None) -> Path | None:
    if not isinstance(storage, str) or not storage.startswith("sqlite"):
        return None
    database = make_url(storage).database
    return Path(database) if database and database != ":memory:" else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No line for each trial, and no warning about what Optuna calls experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two nested mappings, one line each.

    >>> differences({"metric": "val/acc", "space": {"a": ["int4"]}}, {"metric": "val/acc", "space": {"a": ["int4", "int8"]}})
    ['space a: only now int8']
    """
    faults: list[str] = []
    for key in dict.fromkeys([*known, *wanted]):
        name = f"{where}{key}"
        if key not in known or key not in wanted:
            faults.append(f"{name}: only {'in the study' if key in known else 'now'}: {known.get(key, wanted.get(key))}")
            continue
        old, new = known[key], wanted[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            faults += differences(old, new, f"{name} ")
        elif isinstance(old, list) and isinstance(new, list):
            gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
            parts = [f"only in the study {', '.join(map(str, gone))}"] * bool(gone) + [f"only now {', '.join(map(str, come))}"] * bool(come)
            if old != new:
                faults.append(f"{name}: {'; '.join(parts) or f'order in the study {old}, now {new}'}")
        elif old != new:
            faults.append(f"{name}: {old} in the study, {new} now")
    return faults
