"""Opens a study so that several processes can share it, and refuses one with another request."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna import Study
from optuna.storages import BaseStorage, InMemoryStorage

from lq_plugin.search.shared.database import (
    HEARTBEAT,
    SharedStorage,
    StudyError,
    has_heartbeat,
    locked,
    quiet,
    rdb_storage,
)

log = logging.getLogger(__name__)

#: User attribute of a study: what its trials have in common.
FINGERPRINT = "lq_plugin"
_SHOWN = 10


def open_study(
    name: str,
    storage: BaseStorage | str | None,
    directions: list[Any],
    fingerprint: Mapping[str, Any],
    heartbeat: int = HEARTBEAT,
    names: Sequence[str] = (),
) -> Study:
    """Returns the study `name` in `storage`, new or with all its trials.

    Args:
        name: names the study in its storage.
        storage: an Optuna storage or its URL; None keeps the study in memory.
        directions: one for each objective.
        fingerprint: nested mappings of plain values; trials may only be compared where these are equal.
        heartbeat: seconds between signs of life of a running trial, for a storage given by its URL.
        names: of the objectives, for dashboards; none: they show numbers.

    Raises:
        StudyError: naming each difference to the study that is there.
    """
    with locked(storage):
        opened = rdb_storage(storage, heartbeat) if isinstance(storage, str) else storage and SharedStorage.of(storage)
        with quiet():
            study = optuna.create_study(study_name=name, storage=opened, directions=directions, load_if_exists=True)
        if not (isinstance(opened, InMemoryStorage | None) or has_heartbeat(opened)):
            log.warning(
                "%s has no heartbeat: the trial of a killed worker stays RUNNING and is not tried again. SQLite and "
                "PostgreSQL have one",
                type(opened).__name__,
            )
        known = study.user_attrs.get(FINGERPRINT)
        if known is None and study.get_trials(deepcopy=False):
            raise StudyError(f"study {name!r} was not made by lq_plugin; choose another study name")
        if known is None:
            study.set_user_attr(FINGERPRINT, dict(fingerprint))
            if names:
                with quiet():
                    study.set_metric_names(list(names))
        elif faults := differences(known, fingerprint):
            more = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
            listing = "\n".join(f"  - {fault}" for fault in faults[:_SHOWN] + more)
            raise StudyError(
                f"study {name!r} was made for something else, and its trials cannot be compared with new "
                f"ones:\n{listing}\n"
                "  choose another study name, or go back to what the study was made for"
            )
    return study


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    """Returns the differences between two nested mappings, one line each.

    Args:
        known: of the study.
        wanted: of this run.
        where: put before each name.

    >>> stored = {"metric": "val/acc", "space": {"a": ["int4"]}}
    >>> differences(stored, {"metric": "val/acc", "space": {"a": ["int4", "int8"]}})
    ['space a: only now int8']
    """
    faults: list[str] = []
    for key in dict.fromkeys([*known, *wanted]):
        name = f"{where}{key}"
        if key not in known or key not in wanted:
            faults.append(
                f"{name}: only {'in the study' if key in known else 'now'}: {known.get(key, wanted.get(key))}"
            )
            continue
        old, new = known[key], wanted[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            faults += differences(old, new, f"{name} ")
        elif isinstance(old, list) and isinstance(new, list):
            gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
            parts = [f"only in the study {', '.join(map(str, gone))}"] * bool(gone) + [
                f"only now {', '.join(map(str, come))}"
            ] * bool(come)
            if old != new:
                faults.append(f"{name}: {'; '.join(parts) or f'order in the study {old}, now {new}'}")
        elif old != new:
            faults.append(f"{name}: {old} in the study, {new} now")
    return faults
