"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lq_plugin.extras import need_packages
from lq_plugin.utilities.moved import moved_name

Lazy = tuple[Callable[[str], object], Callable[[], list[str]], list[str]]


def attributes(package: str, file: str, needs: Mapping[str, tuple[str, ...]] | None = None) -> Lazy:
    """Returns `__getattr__`, `__dir__` and `__all__` of a package whose names are imported on first use.

    The names are those under `if TYPE_CHECKING:` in its `__init__.py`, so that type checkers, editors and the import
    system read one list.

    Args:
        package: its `__name__`.
        file: its `__file__`.
        needs: optional packages by module; without them a name of that module is a `MissingPackageError`.

    >>> get, _, names = attributes("lq_plugin.report", import_module("lq_plugin.report").__file__)
    >>> "write_page" in names, get("write_page").__module__
    (True, 'lq_plugin.report.page')
    >>> get("writepage")
    Traceback (most recent call last):
    AttributeError: module 'lq_plugin.report' has no attribute 'writepage'
    """
    home = _imports_for_type_checkers(Path(file).read_text(encoding="utf-8"))

    class Package(ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            # The import system binds every submodule, also one with the name of a function: `verify` in `verify.py`.
            if not (name in home and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[package].__class__ = Package

    def get(name: str) -> object:
        if name not in home:
            if (found := moved_name(package, name)) is not None:
                return found
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        need_packages(f"{package}.{name}", *(needs or {}).get(home[name], ()))
        value = getattr(import_module(home[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home}), sorted(home)


def _imports_for_type_checkers(source: str) -> dict[str, str]:
    """Returns the modules by the names that are imported from them under `if TYPE_CHECKING:`."""
    found: dict[str, str] = {}
    for block in ast.parse(source).body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            for line in block.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    found |= {alias.asname or alias.name: line.module for alias in line.names}
    return found
