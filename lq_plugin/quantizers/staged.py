"""Quantizers of one tensor whose spec changes during training, where a plan lowers the precision step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lq_plugin.intent.schedule import Moment
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.base import Quantizer
from lq_plugin.quantizers.slot import SlotQuantizer


class Unquantized(nn.Module):
    """Stage that leaves the tensor float."""

    scales_output = False

    def watch(self, x: Tensor) -> None:
        """Does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    pass_on = forward


class StagedQuantizer(SlotQuantizer):
    """The stages of one tensor, in the place of its quantizer.

    All of them watch the data, one quantizes: `stage`, its index, is in the `state_dict`. A new one is in its last
    stage, until `set_stage` says what the moment in training is. Earlier versions had the last stage's keys next to
    `stage`; `load_state_dict` takes both.

    Args:
        stages: in order; the last one quantizes.
        starts: the moment each stage begins; None: from the beginning.
    """

    stage: Tensor
    last: Quantizer
    earlier: nn.ModuleList
    switches = ("stage",)

    def __init__(self, stages: Sequence[Quantizer | Unquantized], starts: Sequence[Moment | None]) -> None:
        super().__init__()
        # The last one before the others: the states of optimizers are numbered by the order of the parameters.
        self.last = cast(Quantizer, stages[-1])
        self.earlier = nn.ModuleList(stages[:-1])
        self.starts = tuple(starts)
        self._stage = len(self.earlier)
        self.register_buffer("stage", torch.full((1,), self._stage, dtype=torch.int64))

    @property
    def spec(self) -> QuantSpec:
        """The spec that its stages lead to."""
        return self.last.spec

    @property
    def name(self) -> str:
        """The tensor's name, for messages."""
        return self.last.name

    def stages(self) -> tuple[Any, ...]:
        return *self.earlier, self.last

    @property
    def current(self) -> Any:
        self.follow_buffers()
        stage = self.stages()[self._stage]
        return stage if isinstance(stage, Quantizer) else None

    def set_stage(self, epoch: int, step: int) -> bool:
        """Goes to the stage of this moment; returns True if that is another one."""
        self.follow_buffers()
        reached = [index for index, start in enumerate(self.starts) if start is None or start.reached(epoch, step)]
        if not reached or reached[-1] == self._stage:
            return False
        self._stage = reached[-1]
        self._write("stage", self._stage)
        return True

    def forward(self, x: Tensor) -> Tensor:
        self.follow_buffers()
        stages = self.stages()
        others = [stage for index, stage in enumerate(stages) if index != self._stage]
        for stage in others if x.numel() else ():
            stage.watch(x)
        y: Tensor = stages[self._stage](x)
        for stage in others:
            y = stage.pass_on(y)
        return y

    def _read_switches(self) -> None:
        self._stage = int(self.stage)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        here = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        for key in here:
            if (present := _present_key(key)) != key:
                state_dict[prefix + present] = state_dict.pop(prefix + key)
        if here:  # else a float checkpoint
            super()._load_from_state_dict(state_dict, prefix, *others)
            self.forget_switches()


@contextmanager
def stages_in_force(model: nn.Module) -> Iterator[None]:
    """A context in which the quantizer in force stands in the place of each `StagedQuantizer`."""
    held = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, StagedQuantizer)
    ]
    for module, name, staged in held:
        module._modules[name] = staged.current
    try:
        yield
    finally:
        for module, name, staged in held:
            module._modules[name] = staged


def _present_key(key: str) -> str:
    """Returns the present name of an entry in the state of a `StagedQuantizer`."""
    return key if key.partition(".")[0] in ("stage", "last", "earlier") else f"last.{key}"


def present_keys(keys: Sequence[str]) -> dict[str, str]:
    """Returns the keys of a model's state by those that a file has, which an earlier version may have written.

    >>> keys = ["a.weight_quantizer.stage", "a.weight_quantizer.calibrated", "b.input_quantizer.calibrated"]
    >>> list(present_keys(keys).values())
    ['a.weight_quantizer.stage', 'a.weight_quantizer.last.calibrated', 'b.input_quantizer.calibrated']
    """
    parts = {key: key.rpartition("_quantizer.") for key in keys}
    entries: dict[str, set[str]] = {}
    for owner, _, entry in parts.values():
        entries.setdefault(owner, set()).add(entry)
    # A module of the user's may have such a name and such an entry: only a quantizer says whether it has a range.
    staged = {
        owner for owner, found in entries.items() if "stage" in found and found & {"calibrated", "last.calibrated"}
    }
    return {
        key: f"{owner}{between}{_present_key(entry)}" if between and owner in staged else key
        for key, (owner, between, entry) in parts.items()
    }


def in_stages(
    make: Callable[[QuantSpec, str], Quantizer], name: str, stages: list[tuple[Moment | None, QuantSpec | None]]
) -> Any:
    """Returns what quantizes a tensor: a quantizer, or where its spec changes during training a `StagedQuantizer`.

    Args:
        make: makes a quantizer from a spec and a name.
        name: of the tensor.
        stages: when each spec comes into force; a spec of None is float. The last one is not.
    """
    *earlier, (_, last) = stages
    assert last is not None
    quantizer = make(last, name)
    if not earlier:
        return quantizer
    before = [
        make(spec, f"{name} (stage {index})") if spec else Unquantized() for index, (_, spec) in enumerate(earlier)
    ]
    return StagedQuantizer([*before, quantizer], [start for start, _ in stages])
