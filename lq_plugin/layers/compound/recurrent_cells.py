"""LSTMCell, GRUCell and RNNCell: one step of a recurrence, whose loop is the user's."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lq_plugin.layers.compound.base import (
    CompoundWeight,
    InnerWeight,
    InputWeight,
    QuantizedCompound,
    StateWeight,
    register_compound,
)
from lq_plugin.layers.compound.recurrence import Recurrence, kinds_inside

_FORWARDS = (nn.LSTMCell.forward, nn.GRUCell.forward, nn.RNNCell.forward)


@register_compound(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class QuantizedCell(QuantizedCompound):
    """The step on Q(x), Q(W_ih) and Q(W_hh), with Q(h) before W_hh.

    Input `[N, C_in]` or `[C_in]`; weights `[gates · hidden, C_in]`, so that a channel is one gate of one hidden unit.
    """

    input_names = ("input",)
    remark = "biases stay float, and so do the gates and the stored state unless a rule names them"
    is_new = True

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        remark = "its input, the hidden state, stays float in a forward that is not torch's"
        state = (
            StateWeight(module, "weight_hh") if _is_known(module) else InnerWeight(module, "weight_hh", remark=remark)
        )
        return [InputWeight(module, "weight_ih"), state]

    @staticmethod
    def key_of(module: nn.Module, name: str) -> str:
        return "weight_ih"

    @staticmethod
    def inner_operations(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
        kinds = kinds_inside(_mode(module)) if _is_known(module) else ()
        return {f"{kind}_0": (kind, (0,)) for kind in kinds}

    def run_inside(self, input: Tensor, hx: Any = None) -> Any:
        module, mode = cast(Any, self), _mode(self)
        given = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        wanted = {(*input.shape[:-1], module.hidden_size)}
        if input.dim() not in (1, 2) or {tuple(value.shape) for value in given} - wanted:
            self.run(input, hx)  # torch says what is wrong
            raise ValueError(
                f"{mode} cell: the state is {sorted(wanted)}, got {[tuple(value.shape) for value in given]}"
            )
        recurrence = Recurrence(
            mode,
            module.weight_ih,
            module.weight_hh,
            module.bias_ih,
            module.bias_hh,
            None,
            read=self.reader("weight_hh"),
            read_projected=self.reader("weight_hr"),
            hidden=self.operand("hidden_0"),
            cell=self.operand("cell_0"),
            gates=self.operand("gates_0"),
        )
        of_inputs = recurrence.of_inputs(input)
        zeros = input.new_zeros(*input.shape[:-1], module.hidden_size)
        state = recurrence.begin(given) if given else (zeros, zeros)[: 2 if mode == "LSTM" else 1]
        # Under autocast torch's cells keep the state as it is given on a CPU, and in the lower precision elsewhere.
        state = state if input.device.type == "cpu" else tuple(value.to(of_inputs.dtype) for value in state)
        new = recurrence.step(of_inputs, state)
        return new if mode == "LSTM" else new[0]


def _mode(module: Any) -> str:
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"


def _is_known(module: nn.Module) -> bool:
    """Returns whether a cell, quantized or not, has a forward of torch's."""
    return getattr(type(module), "float_class", type(module)).forward in _FORWARDS
