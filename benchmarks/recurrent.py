"""A training step of LSTM and GRU with quantized states, over torch's float step.

    python -m benchmarks.recurrent --json out.json

Two layers of 256 units, 64 steps, batches of 32; forward and backward pass. `cells` is a plain Python loop over torch's
`nn.LSTMCell`, `loop` the float loop of ours that the quantized one adds quantizers to. `w8` quantizes weights alone and
stays in torch's kernel, `w8a8` the sequences and the hidden state as well, `all` also the cell state (16 bits) and the
gates.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import common
from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.layers import show_steps
from lq_plugin.model import quantizers
from lq_plugin.model.training import commit_observers
from lq_plugin.quantizers import ActivationQuantizer

UNITS, LAYERS, STEPS, BATCH = 256, 2, 64, 32
W8A8 = QuantPlan.parse("w8a8")
INSIDE = [Rule("re:.*hidden_l.*", input="int8 ema"), Rule("re:.*gates_l.*", input="int8 ema")]
CELL = Rule("re:.*cell_l.*", input="int16 ema")
KINDS = {"LSTM": (nn.LSTM, [*INSIDE, CELL]), "GRU": (nn.GRU, INSIDE)}


class Cells(nn.Module):
    """The layers as torch's cells, in a loop over the steps."""

    def __init__(self, plain: nn.RNNBase) -> None:
        super().__init__()
        kind = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}[plain.mode]
        self.cells = nn.ModuleList(kind(UNITS, UNITS) for _ in range(LAYERS))
        for layer, cell in enumerate(self.cells):
            cell.load_state_dict({name: getattr(plain, f"{name}_l{layer}") for name in cell.state_dict()})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        for cell in self.cells:
            state, outputs = None, []
            for step in x:
                state = cell(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            x = torch.stack(outputs)
        return x, None


def networks(kind: str, x: torch.Tensor) -> dict[str, nn.Module]:
    """The float module, the float loop, and the quantized ones, with the same weights."""
    make, inside = KINDS[kind]
    plain = make(UNITS, UNITS, num_layers=LAYERS)
    found: dict[str, nn.Module] = {"float": plain, "cells": Cells(plain), "loop": copy.deepcopy(plain)}
    show_steps(found["loop"])
    for name, plan in (("w8", "w8"), ("w8a8", W8A8), ("all", QuantPlan([*W8A8.rules, *inside]))):
        net = nn.ModuleDict({"net": copy.deepcopy(plain)})
        prepare(net, plan)
        calibrate(net, [x], net["net"])
        for quantizer in quantizers(net):
            quantizer.observing = isinstance(quantizer, ActivationQuantizer)
        found[name] = net["net"].train()
    return found


def step_of(net: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    ranges = quantizers(net)

    def step() -> None:
        net.zero_grad()
        net(x)[0].square().mean().backward()
        commit_observers(ranges)

    return step


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser: argparse.ArgumentParser = common.parser(__doc__, data=False)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    common.start(options)
    torch.manual_seed(0)
    x = torch.randn(options.steps, BATCH, UNITS)
    results: dict[str, Any] = {"results": []}
    table = Table("", "step / float", "milliseconds", title="A training step")
    for kind in KINDS:
        times = common.interleaved(
            {name: step_of(net, x) for name, net in networks(kind, x).items()}, options.rounds, warm_up=2
        )
        for name, seconds in times.items():
            ratio = round(common.ratio(times, name, "float")["ratio"], 3)
            row = {"kind": kind, "name": name, "ratio": ratio, "milliseconds": round(1e3 * min(seconds), 1)}
            results["results"].append(row)
            table.add_row(f"{kind} {name}", f"{ratio:.2f}", f"{row['milliseconds']:.1f}")
        common.write_json(options.json, results)
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
