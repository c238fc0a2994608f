"""Extra passes of a LightningModule that leave no trace in the module, its metrics and its loggers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lq_plugin.callbacks.trainer.steps import loaders_as_before
from lq_plugin.model.kept_state import KeptState, state_kept
from lq_plugin.utilities.lightning_packages import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@contextmanager
def without_traces(pl_module: LightningModule) -> Iterator[None]:
    """Lets nothing be logged or sent inside, and puts the module's Python state, metrics and buffers back.

    See `lq_plugin.model.kept_state` for what that is, and what it is not. A step that calls a tracker itself
    (`wandb.log`), or writes files, does so: only what goes through `self.log`, `self.logger` and `trainer.loggers` is
    silenced.
    """
    with loaders_as_before(pl_module._trainer), state_kept(pl_module), silenced(pl_module):
        yield


class KeepState(Callback):
    """The module's Python state after `close` is that of the start of the evaluation; put it before other callbacks."""

    def __init__(self) -> None:
        self._state: KeptState | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not sooner: what `setup` and `configure_model` make belongs to the module.
        self._state = KeptState(pl_module)

    def close(self) -> None:
        """Puts it back."""
        if self._state is not None:
            self._state.close()


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Lets nothing be logged inside.

    Neither with `log` and `log_dict`, nor with the Trainer's loggers and their experiments.
    """
    attributes, trainer = vars(pl_module), pl_module._trainer
    before: dict[str, Any] = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
    attributes["log"] = attributes["log_dict"] = _nothing
    loggers = [] if trainer is None else trainer.loggers
    try:
        if trainer is not None:
            trainer.loggers = [_silent(logger) for logger in loggers]
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for name in ("log", "log_dict"):
            del attributes[name]
        attributes.update(before)


def _silent(logger: Any) -> Any:
    """Returns a logger of the same class, name and folder that sends and writes nothing."""
    kind: Any = type(logger)
    silent: Any = object.__new__(_silent_class(kind))
    vars(silent).update(vars(logger))
    return silent


@functools.cache
def _silent_class(kind: type) -> type:
    methods = {name: _nothing for name in dir(kind) if name.startswith("log_") and callable(getattr(kind, name))}
    methods |= dict.fromkeys(("save", "finalize", "after_save_checkpoint"), _nothing)
    return type(kind.__name__, (kind,), {**methods, "experiment": Nothing()})


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class Nothing:
    """An object that accepts every call, attribute and item, does nothing and returns itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return self

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class SilentLogger(Nothing):
    """A logger that keeps nothing, whatever a step calls; for Trainers that nobody looks at."""

    name = version = ""
    save_dir = root_dir = log_dir = "."
    group_separator = "/"
