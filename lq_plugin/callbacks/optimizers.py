"""Bring learned ranges to the optimizers, and give them a group without weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.optim import Optimizer

from lq_plugin.formats import SLOTS
from lq_plugin.layers import weight_sources
from lq_plugin.model.operations import quantized_operations
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.quantizers import Quantizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Lists that schedulers of torch keep with one element for each parameter group.
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


#: By index of the optimizer: of each group that was made for learned ranges, the index of the one that it was cloned from.
Clones = dict[int, list[int]]


def adopt_learned_ranges(trainer: Trainer, pl_module: LightningModule) -> tuple[list[str], Clones]:
    """See that each learned range is in an optimizer, in a group of its own without weight decay.

    A range goes where its layer's weight is, that of an operation where a weight of its module is; one whose weight no
    optimizer holds goes to the first optimizer. Groups are cloned, and schedulers learn of the new ones, so that a resumed run
    has the same.

    Returns:
        Names of the ranges that the user's `configure_optimizers` had not found, and the groups that were added.
    """
    adopted: list[str] = []
    clones: Clones = {}
    wanted: dict[tuple[int, int, bool], list[nn.Parameter]] = {}
    # A module without optimizers gets one from Lightning that has no groups.
    first = next(((index, 0) for index, optimizer in enumerate(trainer.optimizers) if optimizer.param_groups), None)
    if first is None:
        return adopted, clones
    for owner, weights, quantizer in _owned(pl_module):
        for name, parameter in quantizer.named_parameters():
            if not parameter.requires_grad:
                continue
            decay_free = name in quantizer.no_weight_decay
            place = _find(trainer.optimizers, parameter)
            if place is None:
                adopted.append(f"{owner}.{name}")
            elif not (decay_free and trainer.optimizers[place[0]].param_groups[place[1]].get("weight_decay")):
                continue
            home = place or next(filter(None, (_find(trainer.optimizers, weight) for weight in weights)), None)
            wanted.setdefault((*(home or first), decay_free), []).append(parameter)
    for (index, group, decay_free), parameters in wanted.items():
        _move(trainer, index, group, parameters, decay_free)
        clones.setdefault(index, []).append(group)
    return adopted, clones


def _owned(pl_module: LightningModule) -> Iterator[tuple[str, list[Any], Quantizer]]:
    """Every quantizer, its name, and the weights whose optimizer its range belongs to, the nearest first."""
    for name, layer in quantized_layers(pl_module):
        for slot in SLOTS:
            if (quantizer := getattr(layer, f"{slot}_quantizer")) is not None:
                yield f"{name}.{slot}_quantizer", weight_sources(layer), quantizer
    for name, operation in quantized_operations(pl_module):
        owner = pl_module.get_submodule(operation.operation.place[0])
        ours = {id(parameter) for parameter in operation.parameters()}
        weights = [parameter for parameter in owner.parameters() if id(parameter) not in ours]
        for key, quantizer in operation.named_children():
            yield f"{name}.{key}", weights, cast(Quantizer, quantizer)


def _find(optimizers: list[Optimizer], parameter: Any) -> tuple[int, int] | None:
    for index, optimizer in enumerate(optimizers):
        for group, content in enumerate(optimizer.param_groups):
            if any(held is parameter for held in content["params"]):
                return index, group
    return None


def _move(trainer: Trainer, index: int, source: int, parameters: list[nn.Parameter], decay_free: bool) -> None:
    optimizer = trainer.optimizers[index]
    # A wrapper (LightningOptimizer, DDP) may stand in front: the groups are shared with it.
    moving = {id(parameter) for parameter in parameters}
    template = optimizer.param_groups[source]
    template["params"] = [held for held in template["params"] if id(held) not in moving]
    group = {key: value for key, value in template.items() if key != "params"}
    if decay_free and "weight_decay" in group:
        group["weight_decay"] = 0.0
    group.pop("param_names", None)
    optimizer.add_param_group({**group, "params": parameters})
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer:
            _extend(config.scheduler, source, len(optimizer.param_groups))


def _extend(scheduler: Any, source: int, groups: int) -> None:
    """Repeat element `source` of every per-group list of a scheduler, nested ones too."""
    for inner in getattr(scheduler, "_schedulers", []):
        _extend(inner, source, groups)
    for name in PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == groups - 1:
            values.append(values[source])
