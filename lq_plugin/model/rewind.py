"""Rewinding what reading changes: one-pass iterators, random generators, open files."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Restore = Callable[[], object]


class Recorded:
    """Stands in for an iterator and gives what it gave once more after `rewind`."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._given: list[Any] = []
        self._position = 0

    def __iter__(self) -> Recorded:
        return self

    def __next__(self) -> Any:
        if self._position == len(self._given):
            self._given.append(next(self._iterator))
        self._position += 1
        # A copy: what is given once more must not have been written to.
        return copy.deepcopy(self._given[self._position - 1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def rewind(self) -> None:
        self._position = 0

    @functools.cached_property
    def unwrapped(self) -> Iterator[Any]:
        return itertools.chain(self._given, self._iterator) if self._given else self._iterator


def is_read_once(value: Any) -> bool:
    """Returns whether a value is an iterator and nothing else, such as a generator.

    A database's cursor has methods that a stand-in would lack.
    """
    return isinstance(value, Iterator) and not hasattr(value, "__dict__") and not _has_methods(type(value))


@functools.lru_cache(maxsize=4096)
def _has_methods(kind: type) -> bool:
    known = {*dir(types.GeneratorType), "from_iterable"}  # the second makes an `itertools.chain`
    return any(callable(getattr(kind, name)) for name in dir(kind) if not name.startswith("_") and name not in known)


@functools.singledispatch
def rewinder(value: Any) -> Restore | None:
    """Returns what puts a source of numbers or data back to where it is now; None where it has no such place."""
    return None


@rewinder.register
def _(value: torch.Generator) -> Restore:
    return functools.partial(value.set_state, value.get_state())


@rewinder.register
def _(value: np.random.Generator) -> Restore | None:
    return rewinder(value.bit_generator)


@rewinder.register
def _(value: np.random.BitGenerator) -> Restore:
    return functools.partial(setattr, value, "state", value.state)


@rewinder.register
def _(value: np.random.RandomState) -> Restore:
    return functools.partial(value.set_state, value.get_state())


@rewinder.register
def _(value: random.Random) -> Restore | None:
    return None if isinstance(value, random.SystemRandom) else functools.partial(value.setstate, value.getstate())


@rewinder.register
def _(value: io.IOBase) -> Restore | None:
    # A file that is written to would lose its end.
    if value.closed or not value.seekable() or value.writable():
        return None
    before = value.tell()
    return lambda: value.closed or value.seek(before)
