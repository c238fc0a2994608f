"""Recurrences step by step: what torch's kernels of LSTM, GRU and RNN compute, with quantizers on the way.

A sequence is a list of steps, `[N_t, features]` each: all N samples, or, of a packed sequence, those that are as long,
the longest first. The product with the inputs is one for all steps, that with the state one a step::

    LSTM    i, f, o = σ(W x + b + U Q(h)), g = tanh(...);  c' = Qc(f c + i g);  h' = Qh(W_r Qr(o tanh c'))
    GRU     r, z = σ(W x + b + U Q(h) + b'), n = tanh(W x + b + r (U Q(h) + b'));  h' = Qh(n + z (h - n))
    RNN     h' = Qh(tanh(W x + b + U Q(h)))                                             or relu

The gates i, f, g, o, r, z and n go through one more quantizer, where a plan names it. Equations: torch's documentation
of `nn.LSTM`, `nn.GRU` and `nn.RNN`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lq_plugin.layers.compound.recurrence_gradient import LSTMStep, StateWeightGradient, needs_gradient

Quantize = Callable[[Tensor], Tensor]
#: `(h,)`, and `(h, c)` of an LSTM; `[N, features]` each.
State = tuple[Tensor, ...]
#: What can be quantized by name within a step; of the other modes the hidden state alone, see `kinds_inside`.
_INSIDE = {"LSTM": ("hidden", "cell", "gates"), "GRU": ("hidden", "gates")}


def kinds_inside(mode: str) -> tuple[str, ...]:
    """Returns what of a recurrence can be quantized by name: the hidden state, and the cell state and gates it has."""
    return _INSIDE.get(mode, ("hidden",))


@dataclass(frozen=True)
class Recurrence:
    """One layer of a recurrent module in one direction.

    Args:
        mode: `"LSTM"`, `"GRU"`, `"RNN_TANH"` or `"RNN_RELU"`.
        w_ih, w_hh: `[gates · hidden, features]`, as the forward pass uses them.
        b_ih, b_hh: `[gates · hidden]`, or None.
        w_hr: the projection `[projected, hidden]` of an LSTM, or None.
        read: what the state goes through before `w_hh`.
        read_projected: what it goes through before `w_hr`.
        hidden, cell, gates: what the new state, the cell state and the gates go through; None: nothing.
    """

    mode: str
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    read: Quantize
    read_projected: Quantize
    hidden: Quantize | None = None
    cell: Quantize | None = None
    gates: Quantize | None = None

    def noting(self, states: list[Tensor]) -> Recurrence:
        """Returns this cell with a state's weight without gradient, and a list of the states that it multiplies."""

        def read(h: Tensor) -> Tensor:
            states.append((y := self.read(h)).detach())
            return y

        return replace(self, w_hh=self.w_hh.detach(), read=read)

    def of_inputs(self, x: Tensor) -> Tensor:
        """The share of the inputs `[..., features]` in the gates, with the biases that can be added once."""
        bias = self.b_ih
        if self.b_ih is not None and self.b_hh is not None and self.mode != "GRU":
            bias = self.b_ih + self.b_hh
        return F.linear(x, self.w_ih, bias)

    def begin(self, state: State) -> State:
        """A state that was given, as a step would have left it."""
        return tuple(
            value if quantize is None else quantize(value)
            for value, quantize in zip(state, (self.hidden, self.cell), strict=False)
        )

    def step(self, inputs: Tensor, state: State) -> State:
        """The next state.

        Args:
            inputs: the step's `of_inputs`, `[N, gates · hidden]`.
            state: before.
        """
        h = state[0]
        if self.mode == "GRU":
            return (self._gru(inputs, F.linear(self.read(h), self.w_hh, self.b_hh), h),)
        read = self.read(h)
        new = torch.addmm(inputs, read, self.w_hh.t()) if read.dim() == 2 else inputs + F.linear(read, self.w_hh)
        if self.mode == "LSTM":
            return self._lstm(new, state)
        new = torch.tanh(new) if self.mode == "RNN_TANH" else torch.relu(new)
        return (_through(self.hidden, new),)

    def _lstm(self, gates: Tensor, state: State) -> State:
        if self.gates is None and self.cell is None and needs_gradient(gates) and gates.dtype == state[1].dtype:
            h, c = LSTMStep.apply(gates, state[1])
            return self._projected(h), c
        i, f, g, o = gates.chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        if self.gates is not None:
            i, f, g, o = self.gates(torch.cat([i, f, g, o], -1)).chunk(4, -1)
        c = _through(self.cell, f * state[1] + i * g)
        return self._projected(o * torch.tanh(c)), c

    def _projected(self, h: Tensor) -> Tensor:
        return _through(self.hidden, h if self.w_hr is None else F.linear(self.read_projected(h), self.w_hr))

    def _gru(self, of_inputs: Tensor, of_state: Tensor, h: Tensor) -> Tensor:
        size = of_state.shape[-1] // 3
        (rz, n), (rz_h, n_h) = (part.split([2 * size, size], -1) for part in (of_inputs, of_state))
        r, z = _through(self.gates, torch.sigmoid(rz + rz_h)).chunk(2, -1)
        n = _through(self.gates, torch.tanh(n + r * n_h))
        return _through(self.hidden, n + z * (h - n))


def run(
    recurrence: Recurrence, x: Tensor, sizes: list[int] | None, state: State, reverse: bool
) -> tuple[Tensor, State]:
    """Runs a layer over a sequence in one direction.

    Args:
        recurrence: the layer.
        x: `[L, N, features]`; of a packed sequence `[sum of sizes, features]`.
        sizes: samples at each step of a packed sequence, in falling order; None: all at each.
        state: the first one.
        reverse: from the last step to the first.

    Returns:
        The outputs in the order of the steps, shaped like `x`, and the last state of each sample.
    """
    gates = recurrence.of_inputs(x)
    if recurrence.mode != "GRU" and needs_gradient(recurrence.w_hh):  # a GRU's gate multiplies one product alone
        states: list[Tensor] = []
        gates = StateWeightGradient.apply(gates, recurrence.w_hh, states, reverse)
        recurrence = recurrence.noting(states)
    steps = list(gates.unbind(0) if sizes is None else gates.split(sizes))
    if reverse:
        steps.reverse()
    # Under autocast products are in a lower precision, and torch's kernels keep the state in theirs.
    first = tuple(value.to(gates.dtype) for value in recurrence.begin(state))
    state = first if sizes is None else tuple(value[: len(steps[0])] for value in first)
    ended: list[State] = []
    outputs: list[Tensor] = []
    for inputs in steps:
        if sizes is not None:
            before, now = len(state[0]), len(inputs)
            if now < before:
                ended.append(tuple(value[now:] for value in state))
                state = tuple(value[:now] for value in state)
            elif now > before:
                begun = tuple(value[before:now] for value in first)
                state = tuple(torch.cat(pair) for pair in zip(state, begun, strict=True))
        state = recurrence.step(inputs, state)
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if sizes is None else torch.cat(outputs)), state


def _through(quantize: Quantize | None, x: Tensor) -> Tensor:
    return x if quantize is None else quantize(x)
