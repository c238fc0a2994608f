"""Bring learned ranges to the optimizers, in groups of their own, without weight decay where it would do no good.

`configure_optimizers` does not see them: it may sort every parameter, name its groups, or hand them all to an optimizer
that takes matrices alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lq_plugin.intent.formats import SLOTS
from lq_plugin.layers import weight_sources
from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.quantizers import Quantizer
from lq_plugin.quantizers.learned import LSQWeightQuantizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Lists that schedulers keep with one element for each parameter group: those of torch, and of timm.
PER_GROUP = (
    "base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums",
    "base_values", "warmup_steps",
)  # fmt: skip
#: The `name` of groups of learned ranges, after that of the group they are cloned from.
GROUP_NAME = "learned_ranges"
#: Optimizers, by name, that cannot train a range: Muon turns a matrix orthogonal, SparseAdam takes sparse gradients
#: alone.
UNFIT = frozenset({"Muon", "SparseAdam"})
#: Learning rate of the Adam that trains the ranges of those.
OWN_RATE = 1e-3

#: By index of the optimizer: of each group that was made for learned ranges, the index of the one that it was cloned
#: from.
Clones = dict[int, list[int]]


class Adopted(NamedTuple):
    """Result of `adopt_learned_ranges`: ranges no optimizer had, groups added, optimizers of their own."""

    names: list[str]
    clones: Clones
    own: list[RangeOptimizer]


class RangeOptimizer:
    """Adam for ranges whose weights are trained by an optimizer that cannot take them; it steps when that one does.

    Its learning rate is `OWN_RATE`, times the share that the schedule has left of the leader's highest rate so far.
    """

    def __init__(self, leader: Optimizer, parameters: list[nn.Parameter]) -> None:
        self.leader = leader
        self.adam = torch.optim.Adam([{"params": parameters, "name": GROUP_NAME}], lr=OWN_RATE)
        self.peak = 0.0

    def step(self, trainer: Trainer, optimizer: Any) -> None:
        """Steps if `optimizer`, which is about to step, is the leader."""
        if self.leader not in (optimizer, getattr(optimizer, "optimizer", None)):
            return
        if all(parameter.grad is None for group in self.adam.param_groups for parameter in group["params"]):
            return
        rate = max(float(group["lr"]) for group in self.leader.param_groups)
        self.peak = max(self.peak, rate)
        for group in self.adam.param_groups:
            group["lr"] = OWN_RATE * (rate / self.peak if self.peak else 0.0)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            self.adam.step()
        else:
            scaler.step(self.adam)
        self.adam.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Returns the states for a checkpoint."""
        return {"adam": self.adam.state_dict(), "peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.adam.load_state_dict(state["adam"])
        self.peak = state["peak"]


def hide_learned_ranges(pl_module: LightningModule, seen: Callable[[], bool]) -> None:
    """Hides learned ranges from the module's next call of `configure_optimizers`, unless they are to be `seen`.

    A checkpoint of before they were hidden has them where the module's own code put them.
    """
    show_learned_ranges(pl_module)
    original = pl_module.configure_optimizers

    @functools.wraps(original)
    def configure_optimizers() -> Any:
        show_learned_ranges(pl_module)
        with nullcontext() if seen() else _hidden(pl_module):
            return original()

    configure_optimizers.__dict__["before"] = pl_module.__dict__.get("configure_optimizers")
    pl_module.__dict__["configure_optimizers"] = configure_optimizers


def show_learned_ranges(pl_module: LightningModule) -> None:
    """Takes the patch of `hide_learned_ranges` away, if it is there."""
    patch = pl_module.__dict__.get("configure_optimizers")
    if patch is not None and hasattr(patch, "before"):
        del pl_module.__dict__["configure_optimizers"]
        if patch.before is not None:
            pl_module.__dict__["configure_optimizers"] = patch.before


@contextmanager
def _hidden(pl_module: nn.Module) -> Iterator[None]:
    """Ranges are plain attributes inside, which no list of parameters has."""
    held = [(module, dict(module._parameters)) for module in pl_module.modules() if isinstance(module, Quantizer)]
    try:
        for module, parameters in held:
            module._parameters.clear()
            module.__dict__.update(parameters)
        yield
    finally:
        for module, parameters in held:
            for name in parameters:
                module.__dict__.pop(name, None)
            module._parameters.update(parameters)


def adopt_learned_ranges(trainer: Trainer, pl_module: LightningModule, stages_decay: bool = False) -> Adopted:
    """Sees that each learned range is in an optimizer, in a group of its own, without weight decay if it asks for none.

    A range goes where its layer's weight is, that of an operation where a weight of its module is; one whose weight no
    optimizer holds goes to the first optimizer. Groups are cloned, and schedulers learn of the new ones, so that a
    resumed run has the same. LBFGS has one group, which the ranges join. Where the optimizer is `UNFIT` they go to the
    first one that is not, or to an Adam of their own.

    Args:
        trainer: its optimizers get the ranges.
        pl_module: the module.
        stages_decay: ranges of stages before the last one have the weight decay of their weights, as in 0.1.
    """
    result = Adopted([], {}, [])
    wanted: dict[tuple[int, int, bool], list[nn.Parameter]] = {}
    own: dict[int, list[nn.Parameter]] = {}
    # A module without optimizers gets one from Lightning that has no groups.
    usable = [(index, 0) for index, optimizer in enumerate(trainer.optimizers) if optimizer.param_groups]
    if not usable:
        return result
    first, fit = usable[0], next((place for place in usable if not _unfit(trainer.optimizers[place[0]])), None)
    for owner, weights, quantizer in _owned(pl_module):
        for name, parameter in quantizer.named_parameters():
            if not parameter.requires_grad:
                continue
            decay_free = name in quantizer.no_weight_decay and not (stages_decay and "_quantizer.earlier." in owner)
            place = _find(trainer.optimizers, parameter)
            if place is None:
                result.names.append(f"{owner}.{name}")
            elif not (decay_free and trainer.optimizers[place[0]].param_groups[place[1]].get("weight_decay")):
                continue
            home = place or next(filter(None, (_find(trainer.optimizers, weight) for weight in weights)), None) or first
            if place is None and _unfit(trainer.optimizers[home[0]]):
                if fit is None:
                    own.setdefault(home[0], []).append(parameter)
                    continue
                home = fit
            wanted.setdefault((*home, decay_free), []).append(parameter)
    for (index, group, decay_free), parameters in wanted.items():
        if isinstance(trainer.optimizers[index], torch.optim.LBFGS):
            _join(trainer.optimizers[index], parameters)
            continue
        _move(trainer, index, group, parameters, decay_free)
        result.clones.setdefault(index, []).append(group)
    result.own.extend(RangeOptimizer(trainer.optimizers[index], parameters) for index, parameters in own.items())
    _allow_sparse_gradients(trainer, pl_module)
    return result


def _allow_sparse_gradients(trainer: Trainer, pl_module: LightningModule) -> None:
    """Lets learned ranges of sparse tables have sparse gradients where one optimizer steps both."""
    for _, layer in quantized_layers(pl_module):
        if getattr(layer, "sparse", False) is not True or layer.weight_quantizer is None:
            continue
        for stage in layer.weight_quantizer.stages():
            if isinstance(stage, LSQWeightQuantizer):
                places = [_find(trainer.optimizers, part) for part in (*weight_sources(layer), stage.scale)]
                owners = {place and place[0] for place in places}
                stage.sparse_gradients = len(owners) == 1 and None not in owners


def _unfit(optimizer: Optimizer) -> bool:
    return any(kind.__name__ in UNFIT for kind in type(optimizer).__mro__)


def _owned(pl_module: LightningModule) -> Iterator[tuple[str, list[Any], Quantizer]]:
    """Every quantizer, its name, and the weights whose optimizer its range belongs to, the nearest first."""
    for name, layer in quantized_layers(pl_module):
        for slot in SLOTS:
            if (held := getattr(layer, f"{slot}_quantizer")) is not None:
                for path, quantizer in _quantizers_in(held, f"{name}.{slot}_quantizer"):
                    yield path, weight_sources(layer), quantizer
    for name, operation in quantized_operations(pl_module):
        owner = pl_module.get_submodule(operation.operation.place[0])
        ours = {id(parameter) for parameter in operation.parameters()}
        weights = [parameter for parameter in owner.parameters() if id(parameter) not in ours]
        for key, held in operation.named_children():
            for path, quantizer in _quantizers_in(held, f"{name}.{key}"):
                yield path, weights, quantizer


def _quantizers_in(held: nn.Module, name: str) -> Iterator[tuple[str, Quantizer]]:
    """Yields a quantizer, or those of all stages, with their names."""
    for path, module in held.named_modules(prefix=name):
        if isinstance(module, Quantizer):
            yield path, module


def _find(optimizers: list[Optimizer], parameter: Any) -> tuple[int, int] | None:
    for index, optimizer in enumerate(optimizers):
        for group, content in enumerate(optimizer.param_groups):
            if any(held is parameter for held in content["params"]):
                return index, group
    return None


def _join(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Adds parameters to the one group of LBFGS, whose list it holds a second time, with the number of elements."""
    optimizer.param_groups[0]["params"].extend(parameters)
    optimizer._numel_cache = None


def _move(trainer: Trainer, index: int, source: int, parameters: list[nn.Parameter], decay_free: bool) -> None:
    optimizer = trainer.optimizers[index]
    # A wrapper (LightningOptimizer, DDP) may stand in front: the groups are shared with it.
    moving = {id(parameter) for parameter in parameters}
    template = optimizer.param_groups[source]
    stays = [id(held) not in moving for held in template["params"]]
    for key in ("params", "param_names") if "param_names" in template else ("params",):
        template[key] = [held for held, keep in zip(template[key], stays, strict=True) if keep]
    group = {key: value for key, value in template.items() if key != "params"}
    if decay_free and "weight_decay" in group:
        group["weight_decay"] = 0.0
    group["name"] = _new_name(optimizer, template.get("name"))
    # An optimizer that was given names has one for each parameter.
    named = group.pop("param_names", None) is not None
    held_as = [(f"{group['name']}.{number}", p) for number, p in enumerate(parameters)] if named else parameters
    optimizer.add_param_group({**group, "params": held_as})
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer:
            _extend(config.scheduler, source, len(optimizer.param_groups))


def _new_name(optimizer: Optimizer, source: str | None) -> str:
    """A name that no group of the optimizer has: monitors of learning rates refuse one that two have."""
    base = GROUP_NAME if source is None else f"{source}_{GROUP_NAME}"
    taken = {group.get("name") for group in optimizer.param_groups}
    return next(
        name for name in (base, *(f"{base}_{number}" for number in range(2, len(taken) + 3))) if name not in taken
    )


def _extend(scheduler: Any, source: int, groups: int) -> None:
    """Repeats element `source` of every per-group list of a scheduler, also of nested ones."""
    for inner in getattr(scheduler, "_schedulers", []):
        _extend(inner, source, groups)
    for name in PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == groups - 1:
            values.append(values[source])
