"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def attributes(
    package: str, files: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, for names that stand in its files.

    Args:
        package: its `__name__`.
        files: the names by the file or the room that has them.

    >>> get, _ = attributes("lq_plugin", {"spec": ("QuantSpec",)})
    >>> get("QuantSpec").__module__
    'lq_plugin.spec'
    >>> get("Quant")
    Traceback (most recent call last):
    AttributeError: module 'lq_plugin' has no attribute 'Quant'
    """
    home = {name: f"{package}.{file}" for file, names in files.items() for name in names}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home})
