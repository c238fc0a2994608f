"""Lends the weights of a float model while it is recorded, as `lq_plugin.layers.lent_weights` does with quantizers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lq_plugin.layers import LentBy, WeightInUse, WeightLender, readers_of_weights, unchanged, weight_in_use
from lq_plugin.model.graph.frames import Frame


class FloatLending:
    """Weights of float layers, which know when other code multiplies them.

    Args:
        model: to be recorded; its quantized layers lend their weights themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lenders = {
            layer: (LentBy(layer), {id(reader) for reader in readers})
            for layer, readers in readers_of_weights(model).items()
            if not isinstance(layer, WeightLender)
        }
        self.involved = {id(layer) for layer in self.lenders}.union(*(ids for _, ids in self.lenders.values()))

    def moved(self, module: nn.Module, frames: Iterable[Frame]) -> None:
        """Lends what is read now, and takes back the rest.

        Args:
            module: that was entered or left.
            frames: of the modules that run.
        """
        if id(module) not in self.involved:
            return
        running = {id(frame.module) for frame in frames}
        for layer, (lender, readers) in self.lenders.items():
            weight = layer._parameters["weight"]
            if weight is not None and readers & running and id(layer) not in running:
                layer.__dict__.setdefault("weight", WeightInUse.lent(weight, lender, unchanged))
            else:
                _take_back(layer)

    def end(self) -> None:
        """Takes all weights back."""
        for layer in self.lenders:
            _take_back(layer)


def _take_back(layer: nn.Module) -> None:
    if weight_in_use(layer.__dict__.get("weight")) is not None:
        del layer.__dict__["weight"]
