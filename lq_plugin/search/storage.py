"""Open a study so that several processes can share it, and refuse one that asks for something else."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import make_url

from lq_plugin.errors import QuantizationError

#: User attribute of a study: what its trials have in common.
FINGERPRINT = "lq_plugin"
_SHOWN = 10


class StudyError(QuantizationError):
    """A study that cannot go on: it was made for something else, or too many of its trials failed."""


def open_study(
    name: str,
    storage: BaseStorage | str | None,
    directions: list[Any],
    fingerprint: Mapping[str, Any],
    first: Iterable[tuple[dict[str, Any], dict[str, Any]]] = (),
) -> Study:
    """The study `name` in `storage`, new or with all its trials.

    Args:
        name: names the study in its storage.
        storage: an Optuna storage or its URL; None keeps the study in memory.
        directions: one for each objective.
        fingerprint: nested mappings of plain values; trials may only be compared where these are equal.
        first: parameters and user attributes of trials to enqueue, unless the study has them.

    Raises:
        StudyError: naming each difference to the study that is there.
    """
    with _lock(storage):
        opened = sqlite_storage(storage) if isinstance(storage, str) and storage.startswith("sqlite") else storage
        with quiet():
            study = optuna.create_study(study_name=name, storage=opened, directions=directions, load_if_exists=True)
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
        with quiet():
            for params, attrs in first:
                study.enqueue_trial(params, user_attrs=attrs, skip_if_exists=True)
    return study


def sqlite_storage(url: str) -> RDBStorage:
    """A SQLite storage that waits for other processes and writes ahead.

    With the write-ahead log a transaction costs a third; a loss of power (not of the process) can
    take the last trials with it.
    """
    if (file := _sqlite_file(url)) is None:
        return RDBStorage(url)
    file.parent.mkdir(parents=True, exist_ok=True)
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 100}})

    @event.listens_for(storage.engine, "connect")
    def write_ahead(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.engine.dispose()
    return storage


@contextlib.contextmanager
def _lock(storage: BaseStorage | str | None) -> Iterator[None]:
    """One process at a time: two that make the tables of a new SQLite file at once get in each other's way."""
    file = _sqlite_file(storage)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
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
