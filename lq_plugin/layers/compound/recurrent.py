"""LSTM, GRU and RNN: weights of each layer and direction, and the sequence that goes in."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lq_plugin.layers.compound.base import (
    CompoundWeight,
    InnerWeight,
    InputWeight,
    QuantizedCompound,
    register_compound,
)


@register_compound(nn.LSTM, nn.GRU, nn.RNN)
class QuantizedRecurrent(QuantizedCompound):
    """The float recurrence on Q(x), Q(W_ih), Q(W_hh) and, with `proj_size`, Q(W_hr).

    Input `[L, N, C_in]`, `[N, L, C_in]`, `[L, C_in]` or a `PackedSequence`; weights `[gates · hidden, C_in]`, so that a
    channel is one gate of one hidden unit. Both directions of the first layer read one quantized sequence.
    """

    input_names = ("input",)
    remark = "the hidden state, the gates and the biases stay float inside torch's kernel"

    _flat_weights_names: list[str]
    _flat_weights: list[Any]
    _flat_weight_refs: list[Any]

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        names: list[str] = [name for name in module._flat_weights_names if name.startswith("weight_")]  # type: ignore[union-attr]
        return [_weight(module, name) for name in names]

    @staticmethod
    def key_of(module: nn.Module, name: str) -> str:
        return "weight_ih_l0"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        # torch hands this list to its kernel, and fills it anew where a weight is not the one it has a reference to.
        before = self._flat_weights, self._flat_weight_refs
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        self._flat_weight_refs = [weakref.ref(weight) for weight in self._flat_weights]
        try:
            return super().run(*args, **kwargs)
        finally:
            self._flat_weights, self._flat_weight_refs = before


def _weight(module: nn.Module, name: str) -> CompoundWeight:
    if name == "weight_ih_l0":
        return InputWeight(module, name)
    if name == "weight_ih_l0_reverse":
        return InnerWeight(module, name, input_of="weight_ih_l0")
    reads = "the output of the layer before" if name.startswith("weight_ih") else "the hidden state"
    return InnerWeight(module, name, remark=f"its input, {reads}, stays float")
