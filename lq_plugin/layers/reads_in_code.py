"""Weights of layers that the code of other modules reads, found in that code without running it.

`F.linear(x, self.qkv.weight, bias)`, `self.conv.weight.squeeze(1)` handed to a function. What the code only asks of a
weight, its dtype, device or shape, is no read of its values. Where it does not say of which layer a weight is
(`layers[i].weight`), it may be any one below.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

from torch import nn

from lq_plugin.layers.compound.products_in_code import CHECKPOINTS

#: Asked of a weight without reading its values.
_LOOKS = frozenset(
    (
        "dtype",
        "device",
        "shape",
        "size",
        "ndim",
        "dim",
        "numel",
        "requires_grad",
        "is_cuda",
        "grad",
        "__class__",
        "type",
    )
)
_LIBRARIES = ("torch.", "lightning.", "pytorch_lightning.", "lq_plugin.")


class CodeRead(NamedTuple):
    """A read of an attribute of another module.

    Args:
        path: names from the module to the attribute's owner; None: of some module below.
        attribute: its name.
        function: that reads it.
        writes: whether it is read to be written to, or past autograd (`.data`).
    """

    path: tuple[str, ...] | None
    attribute: str
    function: str
    writes: bool


def own_code(module: nn.Module, entries: tuple[str, ...]) -> tuple[FunctionType, ...]:
    """Returns the functions of a module's own class, and of its file, that these methods may come to.

    The code of libraries is left out.

    Args:
        module: float or quantized.
        entries: names of methods.
    """
    kind: type[nn.Module] = getattr(type(module), "float_class", type(module))
    found = [function for name in entries if (function := _plain(module.__dict__.get(name))) is not None]
    return (*_reached(cast(Any, kind), entries), *found)


def code_reads(function: FunctionType) -> tuple[CodeRead, ...]:
    """Returns the reads of attributes in a function's code."""
    return _reads(function.__code__)


def recomputes(module: nn.Module) -> bool:
    """Returns whether a module's forward recomputes a part of it in the backward pass."""
    functions = own_code(module, ("forward",))
    return any(CHECKPOINTS & set(code.co_names) for function in functions for code in _codes(function.__code__))


def owner_read(module: nn.Module, path: tuple[str, ...]) -> Any:
    """Returns the object that a path of attributes leads to; None where it is missing."""
    value: Any = module
    for name in path:
        value = getattr(value, name, None)
    return value


def _plain(entry: Any) -> FunctionType | None:
    """Returns the function behind a method; None for what is no code of the user's."""
    function = inspect.unwrap(getattr(entry, "__func__", entry)) if callable(entry) else None
    if not isinstance(function, FunctionType) or f"{function.__module__}.".startswith(_LIBRARIES):
        return None
    return function


@lru_cache(maxsize=1024)
def _reached(kind: type[nn.Module], entries: tuple[str, ...]) -> tuple[FunctionType, ...]:
    if f"{kind.__module__}.".startswith(_LIBRARIES):
        return ()
    waiting: list[Any] = [inspect.getattr_static(kind, name, None) for name in entries]
    seen: dict[FunctionType, None] = {}
    while waiting:
        function = _plain(waiting.pop())
        if function is None or function in seen:
            continue
        seen[function] = None
        for name in {name for code in _codes(function.__code__) for name in code.co_names}:
            method = inspect.getattr_static(kind, name, None)
            method = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            waiting += [value for value in (method, function.__globals__.get(name)) if isinstance(value, FunctionType)]
    return tuple(seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@lru_cache(maxsize=4096)
def _reads(function: CodeType) -> tuple[CodeRead, ...]:
    found = []
    this = function.co_varnames[0] if function.co_argcount else ""
    for code in _codes(function):
        steps = list(dis.get_instructions(code))
        for index, step in enumerate(steps):
            if not _gets(step):
                continue
            following = steps[index + 1] if index + 1 < len(steps) else None
            asked = str(following.argval) if following is not None and _gets(following) else ""
            if asked in _LOOKS:
                continue
            start = index - 1
            while start >= 0 and _gets(steps[start]):
                start -= 1
            if start > 0 and steps[start - 1].argval in ("isinstance", "hasattr"):
                continue
            base = steps[start].argval if steps[start].opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else None
            mine = (base[-1] if isinstance(base, tuple) else base) == this
            path = tuple(str(inner.argval) for inner in steps[start + 1 : index]) if mine else None
            writes = asked in ("data", "copy_") or (asked.endswith("_") and not asked.endswith("__"))
            found.append(CodeRead(path, str(step.argval), function.co_name, writes))
    return tuple(found)


def _gets(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")
