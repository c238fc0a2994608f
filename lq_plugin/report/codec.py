"""Converts dataclasses to JSON and back, for `ReportData`.

JSON has no infinity and no NaN: `inf` is written as the text `"inf"`, NaN as null.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from math import isinf, isnan
from typing import Any, TypeVar

from lq_plugin.errors import QuantizationError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Returns plain lists, mappings, numbers and text; fields with their default value are left out.

    >>> from lq_plugin.report.data import Mark
    >>> encode(Mark("mse", -1.0, float("inf")))
    {'label': 'mse', 'low': -1.0, 'high': 'inf'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(value)}
        return {name: encode(item) for name in usual if (item := getattr(value, name)) != usual[name]}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and (isinf(value) or isnan(value)):
        return None if isnan(value) else "inf" if value > 0 else "-inf"
    return value


def decode(kind: type[T], content: Any, where: str = "report") -> T:
    """Returns the dataclass that `encode` turned into `content`.

    Args:
        kind: the dataclass.
        content: plain values, as JSON gives them.
        where: name of the content, for messages.

    Raises:
        QuantizationError: naming the place where the content does not fit.
    """
    found: T = _decode(kind, content, where)
    return found


def _decode(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return content
    if origin in (typing.Union, types.UnionType):
        (inner,) = [argument for argument in arguments if argument is not types.NoneType]
        return None if content is None else _decode(inner, content, where)
    if origin is list:
        _require(isinstance(content, list), "a list", content, where)
        return [_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(content)]
    if origin is dict:
        _require(isinstance(content, dict), "a mapping", content, where)
        return {_text(key, where): _decode(arguments[1], item, f"{where}.{key}") for key, item in content.items()}
    if is_dataclass(kind):
        _require(isinstance(content, dict), "a mapping", content, where)
        hints = typing.get_type_hints(kind)
        unknown = [key for key in content if key not in hints]
        _require(not unknown, f"only {', '.join(hints)}", unknown, where)
        values = {key: _decode(hints[key], item, f"{where}.{key}") for key, item in content.items()}
        try:
            return kind(**values)  # type: ignore[operator]
        except TypeError as error:
            raise QuantizationError(f"{where}: {error}") from None
    if kind is float:
        if content is None:
            return float("nan")
        infinite = content in ("inf", "-inf")
        _require(
            infinite or (isinstance(content, (int, float)) and not isinstance(content, bool)),
            "a number",
            content,
            where,
        )
        return float(content)
    _require(type(content) is kind, f"of type {kind.__name__}", content, where)
    return _text(content, where) if kind is str else content


def _text(content: str, where: str) -> str:
    """Returns a string that can be written: JSON can escape half of a character, which no file can hold."""
    try:
        content.encode()
    except UnicodeEncodeError:
        raise QuantizationError(f"{where} must be text, got {content[:60]!r}") from None
    return content


def _require(fits: bool, wanted: str, got: Any, where: str) -> None:
    if not fits:
        raise QuantizationError(f"{where} must be {wanted}, got {str(got)[:60]!r}")
