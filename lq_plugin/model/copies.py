"""Copies of a user's model, which may hold what cannot be copied."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A deep copy, without the Trainer that a LightningModule may hold.

    What cannot be copied (a lock, an open file, a logger's connection, a generator) is shared with the model.

    >>> import threading
    >>> net = nn.Linear(2, 2)
    >>> net.lock, net.seen = threading.Lock(), [1]
    >>> copied = copy_model(net)
    >>> copied.lock is net.lock, copied.seen is net.seen, copied.weight is net.weight
    (True, False, False)
    """
    trainer = model.__dict__.get("_trainer")
    if trainer is not None:
        model.__dict__["_trainer"] = None
    # Old weight_norm, spectral_norm and pruning keep a weight there that a training step has computed, which torch
    # refuses to copy.
    held = [value for module in model.modules() for value in vars(module).values()]
    memo: dict[int, Any] = {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}
    try:
        try:
            return copy.deepcopy(model, dict(memo))
        except Exception:  # whatever an object of the user's raises: its kind is not known here
            parts = (*model.modules(), *model.parameters(), *model.buffers())
            known = memo | {id(part): part for part in parts}
            for value in held:
                memo |= _uncopyable(value, known)
            return copy.deepcopy(model, memo)
    finally:
        if trainer is not None:
            model.__dict__["_trainer"] = trainer


def _uncopyable(value: Any, known: dict[int, Any]) -> dict[int, Any]:
    """The innermost values that cannot be copied, by identity; `known` ones are passed over."""
    try:
        copy.deepcopy(value, dict(known))
    except Exception:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        found: dict[int, Any] = {}
        for item in inner:
            found |= _uncopyable(item, known)
        return found or {id(value): value}
    return {}
