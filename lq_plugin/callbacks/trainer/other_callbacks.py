"""Lightning's own callbacks next to ours: copies are made of the quantized model, tuners try the quantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from lq_plugin.model.prepare import quantizers
from lq_plugin.utilities.lightning_packages import either

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def tuners() -> tuple[type, ...]:
    """Returns the classes of Lightning's tuners.

    Lightning puts them first; their trial runs need a model that has its ranges and an optimizer that has its scales.
    """
    return (*either("callbacks.BatchSizeFinder"), *either("callbacks.LearningRateFinder"))


def move_before(trainer: Trainer, callback: Callback, kinds: tuple[type, ...]) -> None:
    """Puts a callback of the Trainer before all those of some kinds.

    Args:
        trainer: that has it.
        callback: to be moved.
        kinds: classes of the callbacks that come after it.
    """
    # A new list: the Trainer is walking along the old one.
    before: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    first = next((index for index, other in enumerate(before) if isinstance(other, kinds)), len(before))
    if before.index(callback) > first:
        others = [other for other in before if other is not callback]
        trainer.callbacks = [*others[:first], callback, *others[first:]]  # type: ignore[attr-defined]


def renew_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Copies weight averages again that were made before the quantizers came in.

    Switches and counters are never averaged.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average: Any = getattr(callback, "_average_model", None)
        if average is None:
            continue
        if isinstance(callback, either("callbacks.StochasticWeightAveraging")):
            if _keys(average) != _keys(pl_module):
                callback._average_model = copy.deepcopy(pl_module)
            continue
        if not isinstance(callback, either("callbacks.WeightAveraging")):
            continue
        if _keys(average.module) != _keys(pl_module):
            device = callback._device or pl_module.device
            average = AveragedModel(
                model=pl_module, device=device, use_buffers=callback._use_buffers, **callback._kwargs
            )
            callback._average_model = average
        if not isinstance(average.multi_avg_fn, partial):
            average.multi_avg_fn = partial(_average_floats, average.multi_avg_fn or _one_by_one(average.avg_fn))


def start_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Gives weight averages of nothing yet the ranges and switches that the fit begins with.

    A sanity check evaluates them.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average: Any = getattr(callback, "_average_model", None)
        if (
            isinstance(callback, either("callbacks.WeightAveraging"))
            and average is not None
            and not average.n_averaged.any()
        ):
            for mine, other in zip(quantizers(average.module), quantizers(pl_module), strict=True):
                mine.load_state_dict(other.state_dict())


def _keys(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _one_by_one(function: Callable[[Tensor, Tensor, Any], Tensor] | None) -> Callable[..., None]:
    if function is None:
        found: Callable[..., None] = get_swa_multi_avg_fn()
        return found
    return partial(_each, function)


def _each(function: Callable[..., Tensor], averaged: Sequence[Tensor], current: Sequence[Tensor], count: Any) -> None:
    for mine, new in zip(averaged, current, strict=True):
        mine.copy_(function(mine, new, count))


def _average_floats(
    function: Callable[..., None], averaged: Sequence[Tensor], current: Sequence[Tensor], count: Any
) -> None:
    if averaged[0].is_floating_point():
        function(averaged, current, count)
        return
    # Half enabled is nothing: averaged, a switch that was off once would stay off.
    for mine, new in zip(averaged, current, strict=True):
        mine.copy_(new)
