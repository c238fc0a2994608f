"""The switch of compiled kernels: used or not, and which."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from lq_plugin.native.build import NativeError
from lq_plugin.native.kernels import Kernels

if TYPE_CHECKING:
    from lq_plugin.native.triton_kernels import TritonKernels

#: Kernels of some device. Those of GPUs have methods of `Kernels`, with the same arguments.
FakeQuantizeKernels: TypeAlias = "Kernels | TritonKernels"

log = logging.getLogger(__name__)

_VARIABLE = "LQ_NATIVE"
_CHOICES = {"": None, "0": False, "1": True}
# One value for all threads: autograd runs backward passes in threads of its own, which must choose as the forward pass
# did.
_chosen: list[bool | None] = []


@contextmanager
def use_native(on: bool | None) -> Iterator[None]:
    """Switches compiled kernels on or off, in this block and in all threads.

    Args:
        on: True: yes; False: torch operations alone; None: if they are available.

    Raises:
        NativeError: True, and they cannot be compiled here.

    >>> with use_native(False):
    ...     active() is None
    True
    """
    if on:
        _compiled()
    _chosen.append(on)
    active.cache_clear()
    try:
        yield
    finally:
        _chosen.pop()
        active.cache_clear()


def available() -> bool:
    """Returns True if the kernels compile and run here; compiles them."""
    try:
        _compiled()
    except NativeError:
        return False
    return True


@functools.cache
def active(device: str = "cpu") -> FakeQuantizeKernels | None:
    """Returns the kernels to be used now on a type of device; None: torch operations."""
    on = _chosen[-1] if _chosen else _from_environment()
    if on is False or device not in ("cpu", "cuda"):
        return None
    try:
        return _in_triton() if device == "cuda" else _compiled()
    except NativeError as error:
        if on:
            raise
        _say_once(str(error))
        return None


def _from_environment() -> bool | None:
    value = os.environ.get(_VARIABLE, "")
    if value not in _CHOICES:
        raise NativeError(
            f"the environment's {_VARIABLE} is {value!r}; it can be 0 (off), 1 (on) or empty (where it can be had)"
        )
    return _CHOICES[value]


_compiled = functools.cache(Kernels)


@functools.cache
def _in_triton() -> TritonKernels:
    try:
        # It takes a second to import, and only GPUs want it.
        from lq_plugin.native.triton_kernels import TritonKernels
    except ImportError as error:
        raise NativeError(f"kernels on a GPU need the package triton (pip install triton): {error}") from error
    return TritonKernels()


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("%s; torch operations do the same, more slowly (%s=0 says that this is meant)", reason, _VARIABLE)
