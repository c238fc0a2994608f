"""LSTM, GRU and RNN: weights of each layer and direction, the sequence that goes in, and the state."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from lq_plugin.layers.compound.base import (
    CompoundWeight,
    InnerWeight,
    InputWeight,
    QuantizedCompound,
    StateWeight,
    register_compound,
)
from lq_plugin.layers.compound.recurrence import Recurrence, State, kinds_inside, run

_FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


@register_compound(nn.LSTM, nn.GRU, nn.RNN)
class QuantizedRecurrent(QuantizedCompound):
    """The recurrence on Q(x), Q(W_ih), Q(W_hh) and, with `proj_size`, Q(W_hr), with Q(h) before W_hh.

    Input `[L, N, C_in]`, `[N, L, C_in]`, `[L, C_in]` or a `PackedSequence`; weights `[gates · hidden, C_in]`, so that a
    channel is one gate of one hidden unit. Both directions of a layer read one quantized sequence: the input, or the
    output of the layer before.
    """

    input_names = ("input",)
    remark = "biases stay float, and so do the gates and the stored state unless a rule names them"

    mode: str
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float
    hidden_size: int
    proj_size: int
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

    @staticmethod
    def inner_operations(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
        if not _is_known(module):
            return {}
        kinds = kinds_inside(cast(Any, module).mode)
        return {f"{kind}{suffix}": (kind, (0,)) for suffix, _ in _suffixes(module) for kind in kinds}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        # torch hands this list to its kernel, and fills it anew where a weight is not the one it has a reference to.
        before = self._flat_weights, self._flat_weight_refs
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        self._flat_weight_refs = [weakref.ref(weight) for weight in self._flat_weights]
        try:
            return super().run(*args, **kwargs)
        finally:
            self._flat_weights, self._flat_weight_refs = before

    def run_inside(self, input: Any, hx: Any = None) -> Any:
        output: Any
        packed = isinstance(input, PackedSequence)
        if not packed and (input.dim() not in (2, 3) or not self._steps(input)):
            return self.run(input, hx)  # torch says what is wrong
        batched = packed or input.dim() == 3
        states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        sizes = None
        if packed:
            data, batch_sizes, order, back = input
            sizes = batch_sizes.tolist()
            states = tuple(value if order is None else value.index_select(1, order) for value in states)
        else:
            data = input if batched else input.unsqueeze(1)
            states = states if batched else tuple(value.unsqueeze(1) for value in states)
            data = data.transpose(0, 1) if self.batch_first and batched else data
            batch_sizes = None
        # torch's own checks, of an input as it would have it.
        checked = data.transpose(0, 1) if self.batch_first and not packed else data
        if hx is None:
            cast(Any, self).check_input(checked, batch_sizes)
            states = self._zeros(data, sizes[0] if sizes is not None else data.shape[1])
        else:
            cast(Any, self).check_forward_args(checked, states if self.mode == "LSTM" else states[0], batch_sizes)
        output, last = self._layers(data, sizes, states)
        if packed:
            last = tuple(value if back is None else value.index_select(1, back) for value in last)
            output = PackedSequence(output, batch_sizes, order, back)
        else:
            output = output.transpose(0, 1) if self.batch_first and batched else output
            output = output if batched else output.squeeze(1)
            last = last if batched else tuple(value.squeeze(1) for value in last)
        return output, last if self.mode == "LSTM" else last[0]

    def _steps(self, input: Tensor) -> int:
        return input.shape[1 if self.batch_first and input.dim() == 3 else 0]

    def _zeros(self, data: Tensor, batch: int) -> State:
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        return tuple(data.new_zeros(count, batch, size) for size in sizes)

    def _layers(self, x: Tensor, sizes: list[int] | None, states: State) -> tuple[Tensor, State]:
        """All layers over a sequence, see `recurrence.run`; states are `[layers · directions, N, features]`."""
        last: list[State] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, cast(nn.Module, self).training) if self.dropout else x
                x = self.reader(f"weight_ih_l{layer}")(x)
            outputs = []
            for suffix, reverse in _suffixes(self)[layer * directions : (layer + 1) * directions]:
                state = tuple(value[len(last)] for value in states)
                output, end = run(self._recurrence(suffix), x, sizes, state, reverse)
                outputs.append(output)
                last.append(end)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return x, tuple(torch.stack(values) for values in zip(*last, strict=True))

    def _recurrence(self, suffix: str) -> Recurrence:
        names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr"}
        tensors = {key: getattr(self, f"{name}{suffix}", None) for key, name in names.items()}
        return Recurrence(
            self.mode,
            **cast(Any, tensors),
            read=self.reader(f"weight_hh{suffix}"),
            read_projected=self.reader(f"weight_hr{suffix}"),
            hidden=self.operand(f"hidden{suffix}"),
            cell=self.operand(f"cell{suffix}"),
            gates=self.operand(f"gates{suffix}"),
        )


def _suffixes(module: Any) -> list[tuple[str, bool]]:
    """The ends of the names of each layer's parameters, and whether it runs from the end."""
    ends = [("", False), ("_reverse", True)][: 2 if module.bidirectional else 1]
    return [(f"_l{layer}{end}", reverse) for layer in range(module.num_layers) for end, reverse in ends]


def _is_known(module: nn.Module) -> bool:
    """Returns whether a module, quantized or not, has a forward of torch's, which can be computed step by step."""
    return getattr(type(module), "float_class", type(module)).forward in _FORWARDS


def _weight(module: nn.Module, name: str) -> CompoundWeight:
    if name == "weight_ih_l0":
        return InputWeight(module, name)
    if name.startswith("weight_ih") and name.endswith("_reverse"):
        return InnerWeight(module, name, input_of=name.removesuffix("_reverse"))
    if _is_known(module):
        return StateWeight(module, name)
    reads = "the output of the layer before" if name.startswith("weight_ih") else "the hidden state"
    return InnerWeight(module, name, remark=f"its input, {reads}, stays float in a forward that is not torch's")
