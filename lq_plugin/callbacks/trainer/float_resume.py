"""A fit that goes on from a float checkpoint: its optimizers know nothing of learned ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lq_plugin.callbacks.trainer.optimizers import PER_GROUP, Clones
from lq_plugin.model.prepare import quantizers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def is_float(checkpoint: Mapping[str, Any], callback: str) -> bool:
    """Returns whether a checkpoint is of a run without quantizers and without the callback of that key.

    A partial checkpoint of a quantized run may hold no quantizers either, but it holds the callback.
    """
    if callback in checkpoint.get("callbacks", {}):
        return False
    return "optimizer_states" in checkpoint and not any("_quantizer." in key for key in checkpoint["state_dict"])


def make_room_for_ranges(
    trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any], clones: Clones
) -> None:
    """Brings the optimizers' and schedulers' states of a float checkpoint into the form of those of this run, in place.

    What a parameter had (momentum, step counts) stays with it; learned ranges begin with nothing. A group that was made
    for them takes the options that its origin has in the checkpoint, but not its weight decay.

    Args:
        trainer: its optimizers have the learned ranges already.
        pl_module: the module.
        checkpoint: of the same optimizers, without quantizers; one of others is left for torch to refuse.
        clones: which groups were made for learned ranges, from `adopt_learned_ranges`.
    """
    ours = {id(parameter) for quantizer in quantizers(pl_module) for parameter in quantizer.parameters()}
    for index, (optimizer, saved) in enumerate(zip(trainer.optimizers, checkpoint["optimizer_states"], strict=False)):
        sources = clones.get(index, [])
        if _fits(optimizer, saved, ours, sources):
            _extend_optimizer(optimizer, saved, ours, sources)
    for config, saved in zip(trainer.lr_scheduler_configs, checkpoint.get("lr_schedulers", []), strict=False):
        index = trainer.optimizers.index(config.scheduler.optimizer)
        _extend_scheduler(saved, len(trainer.optimizers[index].param_groups), clones.get(index, []))


def _fits(optimizer: Optimizer, saved: Mapping[str, Any], ours: set[int], sources: list[int]) -> bool:
    floats = [sum(id(parameter) not in ours for parameter in group["params"]) for group in optimizer.param_groups]
    return floats == [len(group["params"]) for group in saved["param_groups"]] + [0] * len(sources)


def _extend_optimizer(optimizer: Optimizer, saved: dict[str, Any], ours: set[int], sources: list[int]) -> None:
    known = saved["param_groups"]
    # Where each group takes its options from; clones may be of clones.
    origin = list(range(len(known)))
    for source in sources:
        origin.append(origin[source])
    state: dict[int, Any] = {}
    groups = []
    number = 0
    for index, group in enumerate(optimizer.param_groups):
        old = iter(known[index]["params"] if index < len(known) else ())
        numbers = []
        for parameter in group["params"]:
            if id(parameter) not in ours and (before := next(old)) in saved["state"]:
                state[number] = saved["state"][before]
            numbers.append(number)
            number += 1
        options = {key: value for key, value in known[origin[index]].items() if key not in ("params", "param_names")}
        if index >= len(known) and "weight_decay" in options:
            options["weight_decay"] = group["weight_decay"]
        if index >= len(known):
            options["name"] = group["name"]
        groups.append({**options, "params": numbers})
    saved["state"], saved["param_groups"] = state, groups


def _extend_scheduler(saved: dict[str, Any], groups: int, sources: list[int]) -> None:
    """Repeats the elements of every list with one for each group."""
    for inner in saved.get("_schedulers", []):
        _extend_scheduler(inner, groups, sources)
    for name in PER_GROUP:
        values = saved.get(name)
        if isinstance(values, list) and len(values) == groups - len(sources):
            for source in sources:
                values.append(values[source])
