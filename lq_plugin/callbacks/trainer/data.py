"""Batches for calibration, and the step that runs a LightningModule on them."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.progress
import torch

from lq_plugin.callbacks.trainer.steps import CalibrationStep, as_step, loaders_of_run, loop_of, own_step, step_runner
from lq_plugin.errors import CalibrationError
from lq_plugin.model.calibrate import Statistics, needs_data
from lq_plugin.model.graph.tensor_identity import leading_size
from lq_plugin.model.kept_state import KeptState
from lq_plugin.model.loaders import loaders_in
from lq_plugin.utilities.lightning_packages import is_overridden, isolate_rng, package_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def calibration_batches(
    trainer: Trainer, pl_module: LightningModule, given: Iterable[Any] | None, count: int, needed: bool = True
) -> Iterator[Any]:
    """Yields up to `count` batches of this rank, on the module's device.

    They come from `given`, or from the train dataloader of the fit, of the datamodule, or of the
    module. Random states, and those of the loader, are as before afterwards.

    Args:
        trainer, pl_module: of the run.
        given: the user's own, or None.
        count: of the batches of each rank.
        needed: False: no batches come where there is no such loader.

    Raises:
        CalibrationError: when there is no such loader, or there are several.
    """
    with isolate_rng(), _datamodule_as_before(trainer):
        loader = _loader(trainer, pl_module, given)
        if loader is None:
            if needed:
                raise CalibrationError(_NO_LOADER)
            return
        with _read_twice(trainer, pl_module, loader) as batches:
            # Each rank takes its share, as a distributed sampler would give it.
            mine = itertools.islice(batches, trainer.global_rank, count * trainer.world_size, trainer.world_size)
            for batch in mine:
                yield _transferred(trainer, pl_module, batch)


@contextmanager
def _datamodule_as_before(trainer: Trainer) -> Iterator[None]:
    """Puts back in a fit what its datamodule counts in the hook that makes the loader, which the fit calls again."""
    datamodule = getattr(trainer, "datamodule", None) if trainer.state.fn == "fit" else None
    held = {} if datamodule is None else vars(datamodule)
    names, before = set(held), {name: value for name, value in held.items() if isinstance(value, (int, float, str))}
    try:
        yield
    finally:
        held.update(before)
        for name in held.keys() - names:
            if hasattr(type(datamodule), name):  # it counts from what its class says
                del held[name]


@contextmanager
def _read_twice(trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Reads a loader in the block without taking batches from the training, which gets all of them after it.

    Generators of loaders, samplers and data sets, positions, and iterators that can be read once are put back, see
    `lq_plugin.model.kept_state`; of tensors and arrays, which are the data, nothing is copied. Batches that are None
    are left out.

    Raises:
        CalibrationError: the training has one iterator, which nothing can stand in for.
    """
    source = trainer.fit_loop._data_source
    holders = (source, source.instance, getattr(trainer, "datamodule", None), pl_module)
    state = KeptState(loader, *(holder for holder in holders if holder is not None), values=False)
    try:
        batches = state.stand_in(loader)
        once = isinstance(loader, Iterator) and batches is loader
        if once and trainer.state.fn == "fit" and source.is_defined() and source.dataloader() is loader:
            raise CalibrationError(
                f"the training data is a {type(loader).__name__}, which can be read once: calibration would take its "
                "first batches; "
                "give others: QAT(plan, dataloader=...)"
            )
        # A Trainer takes no step on None either.
        yield (batch for batch in batches if batch is not None)
    finally:
        state.close()


def _transferred(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Returns a batch as Lightning hands it to a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def one_batch(
    trainer: Trainer, pl_module: LightningModule, given: Iterable[Any] | None, step: CalibrationStep | None
) -> tuple[Callable[[], Any], int | None]:
    """Returns a function that runs the module on one batch, on its device and in the Trainer's precision.

    The batch is that of `one_float_batch`.

    Args:
        trainer, pl_module: of the run.
        given: the user's own calibration data, or None.
        step: the user's own step, or None.

    Returns:
        A function, and the samples of its batch: dim 0 of its first tensor; None without a tensor.

    Raises:
        CalibrationError: there is no batch (or none but of the evaluation, where ranges need training data), or no step
            that takes it.
    """
    # Where ranges will need others, that is said before anything of the module changes.
    batch, step = _batch_and_step(
        trainer,
        pl_module,
        given,
        step,
        lambda batch: _transferred(trainer, pl_module, batch),
        or_evaluation=not needs_data(pl_module),
    )
    run = step_runner(trainer, pl_module, step)
    return lambda: run(batch), leading_size(batch)


def one_float_batch(
    trainer: Trainer, pl_module: LightningModule, given: Iterable[Any] | None, step: CalibrationStep | None
) -> Callable[[], Any]:
    """Returns a function that runs the module on one batch before the strategy has moved or converted it.

    It runs in float32, where the parameters are. The batch is one that `calibration_batches` would give or, where there
    is no such loader, one of the evaluation at hand.

    Args:
        trainer, pl_module: of the run.
        given: the user's own calibration data, or None.
        step: the user's own step, or None.

    Raises:
        CalibrationError: there is no batch, or no step that takes it.
    """

    def to_parameters(batch: Any) -> Any:
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, pl_module.device, dataloader_idx=0)

    batch, step = _batch_and_step(trainer, pl_module, given, step, to_parameters)
    return lambda: step(pl_module, batch)


def _batch_and_step(
    trainer: Trainer,
    pl_module: LightningModule,
    given: Iterable[Any] | None,
    step: CalibrationStep | None,
    transferred: Callable[[Any], Any],
    or_evaluation: bool = True,
) -> tuple[Any, CalibrationStep]:
    with isolate_rng(), _datamodule_as_before(trainer):
        loader = _loader(trainer, pl_module, given)
        if loader is None:
            steps: dict[str | None, str] = {"test": "test_step", "predict": "predict_step"}
            name = steps.get(trainer.state.fn, "validation_step")
            loop = loop_of(trainer, name)
            if not or_evaluation or not loop._data_source.is_defined() or not is_overridden(name, pl_module):
                raise CalibrationError(_NO_LOADER)
            loader = itertools.chain.from_iterable(loaders_of_run(loop._data_source.dataloader()))
            step = step or as_step(trainer, pl_module, name)
        with _read_twice(trainer, pl_module, loader) as batches:
            batch = next(iter(batches), None)
            if batch is None:
                raise CalibrationError("no calibration data: the loader gave 0 batches")
            # Here, for what its hooks count in the module and in the datamodule is put back with the loader.
            batch = transferred(batch)
    return batch, step or own_step(trainer, pl_module)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Starts every source of random numbers from `seed` inside, and goes on outside as if nothing had been drawn.

    With None nothing changes.
    """
    if seed is None:
        yield
        return
    with isolate_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


def with_progress(trainer: Trainer, description: str, batches: Iterator[Any], total: int) -> Iterator[Any]:
    """Returns the same batches with a progress bar, where the Trainer shows one.

    Args:
        trainer: of the run.
        description: of the bar.
        batches: read once.
        total: how many there are at most.
    """
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    return iter(rich.progress.track(batches, description, total=total, disable=not shown, transient=True))


#: The error where there is no calibration data.
_NO_LOADER = (
    "no calibration data: neither a datamodule nor the LightningModule has a train_dataloader; give one: "
    "PTQ(plan, dataloader=...)"
)


def _loader(trainer: Trainer, pl_module: LightningModule, given: Iterable[Any] | None) -> Iterable[Any] | None:
    """Returns the loader of calibration batches; None where there is none.

    Raises:
        CalibrationError: there are several.
    """
    found = given if given is not None else _train_loader(trainer, pl_module)
    if found is None:
        return None
    loaders = loaders_of_run(found) if given is None else loaders_in(found)
    if len(loaders) > 1:
        # Lightning trains on batches of all of them at once, and validates on one after the other: neither is what is
        # meant for sure.
        name = "dataloader" if given is not None else "train_dataloader"
        raise CalibrationError(
            f"calibration takes the batches of one loader, {name} gives {len(loaders)}: say which, as "
            "PTQ(plan, dataloader=...) or QAT(plan, dataloader=...)"
        )
    only: Iterable[Any] = loaders[0]
    return only


#: By Trainer: the datamodule that calibration has set up for a fit, in this run of an evaluation.
_SET_UP: weakref.WeakKeyDictionary[Trainer, Callable[[], Any]] = weakref.WeakKeyDictionary()


def new_run(trainer: Trainer) -> None:
    """A run begins, for which no datamodule has been set up yet."""
    _SET_UP.pop(trainer, None)


def _train_loader(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Returns the train dataloader of the run, of its datamodule or of the module; None where there is none.

    Raises:
        CalibrationError: the hook fails in a run that sets up another stage than a fit.
    """
    source = trainer.fit_loop._data_source
    if source.is_defined() and not (source.is_module() and trainer.state.fn != "fit"):
        return source.dataloader()
    datamodule = getattr(trainer, "datamodule", None)
    owner: Any = next(
        (o for o in (datamodule, pl_module) if o is not None and is_overridden("train_dataloader", o)), None
    )
    if owner is None:
        return None
    try:
        if owner is datamodule and _SET_UP.get(trainer, lambda: None)() is not datamodule:
            # An evaluation has only set up its own stage. A module is not set up again: it may build its layers there.
            package_of(trainer).trainer.call._call_lightning_datamodule_hook(trainer, "setup", stage="fit")
            _SET_UP[trainer] = weakref.ref(datamodule)
        return owner.train_dataloader()
    except Exception as error:
        raise CalibrationError(
            f"no calibration data: {type(owner).__name__}.train_dataloader fails in an evaluation, "
            f"{type(error).__name__}: {error}; "
            "give the batches: PTQ(plan, dataloader=...)"
        ) from error


def all_reduce_max(trainer: Trainer) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Returns a function for the elementwise maximum over the Trainer's ranks; None with one process."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return None

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor

    return reduce


def statistics_merger(trainer: Trainer) -> Callable[[Statistics], None] | None:
    """Returns the function that joins the statistics of all ranks; None with one process."""
    return None if all_reduce_max(trainer) is None else _merge_statistics


def _merge_statistics(statistics: Statistics) -> None:
    """Joins the statistics of all ranks, in place, with one bucketed all-reduce for each kind of tensor."""
    histograms = list(statistics.values())
    if not histograms:
        return  # a plan for weights alone, on every rank

    def reduce(parts: list[torch.Tensor], operation: Any) -> list[torch.Tensor]:
        bucket = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(bucket, operation)
        return [new.view_as(old) for new, old in zip(bucket.split([p.numel() for p in parts]), parts, strict=True)]

    highest, total = torch.distributed.ReduceOp.MAX, torch.distributed.ReduceOp.SUM
    for histogram, octave in zip(histograms, reduce([h.common_range() for h in histograms], highest), strict=True):
        histogram.rebin(octave)
    for name in ("counts", "zeros", "total"):
        for histogram, value in zip(histograms, reduce([getattr(h, name) for h in histograms], total), strict=True):
            setattr(histogram, name, value)
    for name, sign in (("maximum", 1.0), ("minimum", -1.0)):
        for histogram, value in zip(
            histograms, reduce([sign * getattr(h, name) for h in histograms], highest), strict=True
        ):
            setattr(histogram, name, sign * value)
