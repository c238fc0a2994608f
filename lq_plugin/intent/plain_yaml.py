"""Reads untrusted YAML: plain values or one error come out, nothing is executed, and memory is bounded.

A file that this library writes says in its first line how it ends, because the beginning of a long plan is also a valid
plan: a truncated file must not pass for a whole one. Files written by hand need no such line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lq_plugin.errors import PlanError

#: A plan is a mapping of lists of mappings of mappings. C parsers crash on a hundred thousand brackets.
MAX_DEPTH = 20
#: Characters of all values once aliases are written out: "billion laughs" is a kilobyte that expands to a terabyte.
MAX_SIZE = 50_000_000
#: Announces `END` as the last line, YAML's own mark of the end of a document.
ANNOUNCED = "# This file is whole if its last line is '...'"
END = "..."
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def plain_yaml_text(content: Any) -> str:
    """Returns plain values as YAML between the two lines that tell a whole file from a truncated one.

    >>> print(plain_yaml_text({"rules": []}))
    # This file is whole if its last line is '...'
    rules: []
    ...
    <BLANKLINE>
    """
    return f"{ANNOUNCED}\n{yaml.safe_dump(content, sort_keys=False)}{END}\n"


def read_plain_yaml(path: Path) -> Any:
    """Returns the content of a YAML file: mappings, lists and plain values.

    Raises:
        PlanError: naming the file, when it cannot be opened, is cut off, is no plain YAML (tags that build objects, a
            date that is none), is nested deeper than `MAX_DEPTH`, or stands for more than `MAX_SIZE` characters.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot open the plan file {str(path)!r}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a name with a null byte
        raise PlanError(f"{path} is not plain YAML: {error}") from error
    try:
        _check_end(text)
        _check_depth(text)
        content = yaml.load(text, Loader=_LOADER)  # the safe one
        _check_size(content)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # 2024-13-01 is a ValueError of datetime
        raise PlanError(f"{path} is not plain YAML: {error}") from error
    return content


def _check_end(text: str) -> None:
    lines = [line for line in text.splitlines() if line.strip()]
    if ANNOUNCED in lines and [line for line in lines if not line.startswith("#")][-1:] != [END]:
        raise PlanError(f"the file is cut off: its first line announces a last line {END!r}, which is not there")


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise PlanError(f"line {line}: nested deeper than {MAX_DEPTH} levels, no plan is")


def _check_size(content: Any) -> None:
    size, waiting = 0, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise PlanError("a value contains itself")
        size += len(value) if isinstance(value, (str, bytes)) else 1
        if size > MAX_SIZE:
            raise PlanError(f"its aliases stand for more than {MAX_SIZE:,} characters")
        if isinstance(value, Mapping):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(item, depth + 1) for item in value]
