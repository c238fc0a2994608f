"""Both packages of Lightning, `lightning` and `pytorch_lightning`: the same names, but no class of one is the other's.

What is asked of Lightning is asked here, of the package that the run at hand belongs to. Only what the user has
imported is used; where nothing is yet, `lightning` is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

#: Modules with the same content in both packages.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
#: Parents of the loggers that they write to.
LOGGERS = (*PACKAGES, "lightning.fabric", "lightning_fabric")


def any_package() -> Any:
    """Returns a package that is imported already, else `lightning.pytorch`: for things that are the same in both."""
    return import_module(next((name for name in PACKAGES if name in sys.modules), PACKAGES[0]))


def package_of(instance: object) -> Any:
    """Returns the package that the class of a Trainer, module or datamodule derives from.

    Raises:
        TypeError: it is of neither.
    """
    for base in type(instance).__mro__:
        for name in PACKAGES:
            if f"{base.__module__}.".startswith(f"{name}."):
                return sys.modules[name]
    raise TypeError(f"{type(instance).__name__} derives from no class of {' or '.join(PACKAGES)}")


def either(path: str) -> tuple[Any, ...]:
    """Returns the class at a path (`callbacks.Timer`) of each imported package, for `isinstance`; maybe none."""
    module, _, name = path.rpartition(".")
    packages = [".".join(filter(None, (package, module))) for package in PACKAGES if package in sys.modules]
    found = [getattr(import_module(package), name, None) for package in packages]
    return tuple(cls for cls in found if cls is not None)


def is_overridden(name: str, instance: object) -> bool:
    """Returns True if a module or datamodule overrides Lightning's method of a name."""
    return bool(package_of(instance).utilities.model_helpers.is_overridden(name, instance))


def logged(trainer: Trainer) -> dict[str, float]:
    """Returns the metrics that the last run of a Trainer logged, as plain floats."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def isolate_rng() -> AbstractContextManager[None]:
    """Restores the random states after the block."""
    isolated: AbstractContextManager[None] = any_package().utilities.seed.isolate_rng()
    return isolated


if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback, Trainer
else:
    _Callback = any_package().Callback


class Callback(_Callback):
    """A callback for Trainers of both packages.

    A Trainer calls whatever is in its list of callbacks. But a single callback (`Trainer(callbacks=QAT("w4a8"))`) must
    be an instance of the package's own class, and one in the config of LightningCLI a subclass before there is one.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Callback:
        _join_packages()
        return super().__new__(cls)


def _join_packages() -> None:
    """Makes `Callback` a subclass of the classes of that name in all packages that are imported by now."""
    Callback.__bases__ += tuple(base for base in either("Callback") if not issubclass(Callback, base))


class _JoinLater(MetaPathFinder):
    """Joins a package that is imported after this module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in PACKAGES else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _join_packages()

        vars(spec.loader)["exec_module"] = exec_module
        return spec


_join_packages()
sys.meta_path.insert(0, _JoinLater())
