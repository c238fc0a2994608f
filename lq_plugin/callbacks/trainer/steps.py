"""Running a LightningModule's own steps outside of Lightning's loops, called as the loops call them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from lq_plugin.errors import CalibrationError, QuantizationError
from lq_plugin.utilities.lightning_packages import any_package, is_overridden, package_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Runs the module on one batch, for calibration.
CalibrationStep: TypeAlias = "Callable[[LightningModule, Any], Any]"

#: The steps that a module may have, those that say most about its use first.
_STEPS = ("validation_step", "test_step", "predict_step", "training_step")
#: What a Trainer says that it does in each.
_STAGES = dict(zip(_STEPS, ("validate", "test", "predict", "train"), strict=True))
#: Attributes of a Trainer that exist once the loaders of its validation do.
_LOADERS = frozenset({"val_dataloaders", "num_val_batches", "num_sanity_val_batches"})
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def step_runner(trainer: Trainer, pl_module: LightningModule, step: CalibrationStep | None) -> Callable[[Any], Any]:
    """Returns a function that runs the module on one batch the way its author does, in the Trainer's precision.

    Args:
        trainer, pl_module: of the run.
        step: the user's own step; that of the module when None.

    Raises:
        CalibrationError: when the module has no step that can run without training it.
    """
    if step is None:
        step = own_step(trainer, pl_module)

    def run(batch: Any) -> Any:
        with trainer.precision_plugin.forward_context():
            return step(pl_module, batch)

    return run


def own_step(trainer: Trainer, pl_module: LightningModule) -> CalibrationStep:
    """Returns the module's own step that can run without training it.

    Raises:
        CalibrationError: there is none.
    """
    for name in _STEPS:
        if name == "training_step" and not pl_module.automatic_optimization:
            continue  # it would take optimizer steps
        if is_overridden(name, pl_module):
            return as_step(trainer, pl_module, name)
    raise CalibrationError(
        f"{type(pl_module).__name__} has no validation, test or predict step, and its training step optimizes by hand; "
        "give calibration_step=lambda module, batch: ..."
    )


def loop_of(trainer: Trainer, name: str) -> Any:
    """Returns the evaluation loop that runs a step in the Trainer's present task; None for the training step."""
    fitting = trainer.state.fn == "fit"
    validation = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    return {"validation_step": validation, "test_step": trainer.test_loop, "predict_step": trainer.predict_loop}.get(
        name
    )


def as_step(trainer: Trainer, pl_module: LightningModule, name: str) -> CalibrationStep:
    """Returns one of the module's own steps, as a function of the module and a batch.

    The Trainer is in the step's stage meanwhile. Where the step fails, what Lightning does at the start of its loop may
    have been missing: the loaders of a validation are made, the module's hooks called, and the step again. Several
    processes make the loaders together, before any of them runs the step, where the module's code reads them.

    Args:
        trainer, pl_module: of the run.
        name: of the step.
    """
    arguments = _arguments_after_batch(getattr(pl_module, name), loop_of(trainer, name))
    takes_iterator = _takes(getattr(pl_module, name), "dataloader_iter", explicit=True)
    alone = trainer.world_size == 1
    if not alone and _lacks_loaders(trainer, name) and _reads_loaders(type(pl_module)):
        with _stage(trainer, name):
            loop_of(trainer, name).setup_data()

    def call(module: LightningModule, batch: Any) -> Any:
        if takes_iterator:
            return getattr(module, name)(iter([(batch, 0, 0)]))
        return getattr(module, name)(batch, *arguments)

    def step(module: LightningModule, batch: Any) -> Any:
        with _stage(trainer, name):
            try:
                return call(module, batch)
            except Exception as error:
                hooks = _hooks_before(trainer, module, name)
                if _is_final(error):
                    raise
                lacks_loaders = alone and _lacks_loaders(trainer, name)
                if not hooks and not lacks_loaders:
                    raise _explained(module, name, hooks, error) from error
            try:
                if lacks_loaders:
                    loop_of(trainer, name).setup_data()
                for hook in hooks:
                    getattr(module, hook)()
                return call(module, batch)
            except Exception as error:
                if _is_final(error):
                    raise
                raise _explained(module, name, hooks, error) from error

    return step


@contextmanager
def _stage(trainer: Trainer, name: str) -> Iterator[None]:
    """Has the Trainer say inside that it does what it does when its own loop runs the step."""
    before, stages = trainer.state.stage, package_of(trainer).trainer.states.RunningStage
    trainer.state.stage = stages(_STAGES[name])
    try:
        yield
    finally:
        trainer.state.stage = before


def _lacks_loaders(trainer: Trainer, name: str) -> bool:
    """Returns whether `trainer.val_dataloaders`, which a validation step may read, is still to be made."""
    if name != "validation_step" or trainer.state.fn != "fit":
        return False
    loop = loop_of(trainer, name)
    return loop._combined_loader is None and bool(loop._data_source.is_defined())


@contextmanager
def loaders_as_before(trainer: Trainer | None) -> Iterator[None]:
    """Forgets loaders of a fit's validation that were made inside: the Trainer makes its own when it comes to it."""
    loop = None if trainer is None else trainer.fit_loop.epoch_loop.val_loop
    before = None if loop is None or loop._combined_loader is not None else dict(vars(loop))
    try:
        yield
    finally:
        if before is not None:
            vars(loop).update(before)


def _reads_loaders(kind: type[LightningModule]) -> bool:
    """Returns whether the code of a module's class names one of `_LOADERS`."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith(("lightning.", "pytorch_lightning."))]
    functions = [inspect.unwrap(getattr(value, "fget", value)) for base in own for value in vars(base).values()]
    codes = [function.__code__ for function in functions if inspect.isfunction(function)]
    for code in codes:
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
    return any(not _LOADERS.isdisjoint(code.co_names) for code in codes)


def _arguments_after_batch(function: Callable[..., Any], loop: Any) -> tuple[int, ...]:
    """Returns the arguments that Lightning's loops give after the first batch.

    They are the batch's number, and its loader's number where there are several.
    """
    indices = 1 if _takes(function, "batch_idx", min_args=2) else 0
    # Before the loop has asked a hook for its loaders, only the step says that there are several.
    required = [
        p for p in inspect.signature(function).parameters.values() if p.kind in _POSITIONAL and p.default is p.empty
    ]
    if (loop is not None and _several_loaders(loop)) or len(required) > 1 + indices:
        indices += 1
    return (0,) * indices


def _takes(function: Callable[..., Any], parameter: str, **options: Any) -> bool:
    """Returns whether Lightning would give a hook an argument of that name."""
    return bool(any_package().utilities.signature_utils.is_param_in_hook_signature(function, parameter, **options))


def loaders_of_run(value: Any) -> list[Any]:
    """Returns the loaders that a Trainer reads, in its order.

    They are all leaves of lists, tuples and dicts, of whatever class.
    """
    # A CombinedLoader keeps what it was made of; those of both packages take values apart alike.
    flattened: list[Any] = any_package().utilities.CombinedLoader(getattr(value, "iterables", value)).flattened
    return flattened


def _several_loaders(loop: Any) -> bool:
    """Returns whether an evaluation loop reads several loaders, so that it gives the step a loader's number."""
    source, combined = loop._data_source, loop._combined_loader
    if combined is None and not source.is_module():
        combined = source.instance
    # A CombinedLoader in another mode gives one batch of all of them at once.
    if getattr(combined, "_mode", "sequential") != "sequential":
        return False
    return bool(loop.num_dataloaders > 1) if loop._combined_loader is not None else len(loaders_of_run(combined)) > 1


def _hooks_before(trainer: Trainer, module: LightningModule, name: str) -> list[str]:
    """Returns the module's own hooks that Lightning calls before the first batch of a step, in its order."""
    stage = {"training_step": "train"}.get(name, name.removesuffix("_step"))
    first = ["on_fit_start"] if trainer.state.fn == "fit" else []
    return [hook for hook in (*first, f"on_{stage}_start", f"on_{stage}_epoch_start") if is_overridden(hook, module)]


def _is_final(error: Exception) -> bool:
    """Returns whether an error needs no explanation, or is for Lightning's batch size finder."""
    return isinstance(error, QuantizationError) or any_package().utilities.memory.is_oom_error(error)


def _explained(module: LightningModule, name: str, hooks: list[str], error: Exception) -> CalibrationError:
    kind = type(module).__name__
    lines = [f"{kind}.{name} fails on a batch of the calibration data: {type(error).__name__}: {error}"]
    if missing := _makers_of(module, error, hooks):
        lines.append(
            f"self.{getattr(error, 'name', '')} is made in {' and '.join(missing)}, which Lightning calls later: make "
            "it before"
        )
    called = f"after {' and '.join(hooks)} had been called" if hooks else "before Lightning's own loops"
    lines.append(
        f"it ran outside of the loops, {called}; where training batches have another form than its own, give "
        "dataloader=... with batches "
        "that it takes, or calibration_step=lambda module, batch: ..."
    )
    return CalibrationError("\n  ".join(lines))


def _makers_of(module: LightningModule, error: Exception, called: list[str]) -> list[str]:
    """Returns the module's hooks that were not called and whose code names the attribute that the module lacks."""
    if not isinstance(error, AttributeError) or error.obj is not module:
        return []
    hooks = [
        name
        for name in vars(any_package().core.hooks.ModelHooks)
        if name.startswith("on_") and name not in called and is_overridden(name, module)
    ]
    codes = {name: getattr(getattr(module, name), "__code__", None) for name in hooks}
    return [name for name, code in codes.items() if code is not None and error.name in code.co_names]
