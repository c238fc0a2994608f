"""Builds samplers, pruners and storages of Optuna from configs with `_target_`.

Not `hydra.utils.instantiate`: it calls whatever a config names, and Hydra 1.4 warns about every such call.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend

from lq_plugin.errors import QuantizationError
from lq_plugin.search.shared.database import quiet
from lq_plugin.utilities.passwords import masked, passwords_in, without

_PARTS: tuple[type, ...] = (BaseSampler, BasePruner, BaseStorage, BaseJournalBackend)


def part_class(config: Any, kind: type, where: str) -> type:
    """Returns the class that `config` names.

    Args:
        config: a mapping with `_target_`.
        kind: the base class that is wanted.
        where: the setting's name, for messages.

    Raises:
        QuantizationError: it names none, or no subclass of `kind`.
    """
    target = config.get("_target_") if isinstance(config, Mapping) else None
    if not isinstance(target, str):
        raise QuantizationError(
            f"{where}: a mapping with the _target_ of an Optuna {kind.__name__} is wanted, got {masked(config)!r}"
        )
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise QuantizationError(f"{where}: cannot find {target}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise QuantizationError(f"{where}: {target} is no Optuna {kind.__name__}")
    return found


def build(config: Mapping[str, Any], kind: type, where: str) -> Any:
    """Calls the `_target_` of `config` with all other keys; mappings with a `_target_` inside are built first.

    Args:
        config: plain mappings, lists and values.
        kind: what it must be.
        where: names the config in errors.

    Raises:
        QuantizationError: it is none, or takes no such arguments.

    >>> import optuna
    >>> median = {"_target_": "optuna.pruners.MedianPruner"}
    >>> config = {"_target_": "optuna.pruners.PatientPruner", "wrapped_pruner": median, "patience": 2}
    >>> type(build(config, BasePruner, "hydra.sweeper.pruner")).__name__
    'PatientPruner'
    """
    made = part_class(config, kind, where)
    arguments = {
        key: _nested(value, f"{where}.{key}") if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in config.items()
        if not key.startswith("_")
    }
    try:
        with quiet():
            return made(**arguments)
    except (TypeError, ValueError) as error:
        raise QuantizationError(
            f"{where}: cannot make {config['_target_']}: {without(str(error), passwords_in(config))}"
        ) from error


def _nested(config: Mapping[str, Any], where: str) -> Any:
    named = part_class(config, object, where)
    kind = next((part for part in _PARTS if issubclass(named, part)), None)
    if kind is None:
        raise QuantizationError(f"{where}: {config['_target_']} is no part of Optuna that a sweep can use")
    return build(config, kind, where)
