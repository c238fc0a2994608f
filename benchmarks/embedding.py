"""A training step and an evaluation of a network that reads 1,024 rows of an embedding table, over the float ones.

    python -m benchmarks.embedding --json out.json --rows 1000 30000 300000 --columns 32 256

The network: 256 samples of four rows each, their mean, a hidden layer of 256, ten classes; SGD, dense and sparse
gradients. `layer` is the evaluation of the table alone. A turn of a network is 20 ms of calls. Learned scales
have sparse gradients where the table has, as `QAT` switches them on. The peer is torchao's quantization-aware embedding
(int4 per group of 32), where it is installed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import common
from lq_plugin import calibrate, prepare
from lq_plugin.quantizers.learned import LSQWeightQuantizer

SPECS = ("int8 per_channel", "int8", "int4 per_channel mse", "int4 group32", "int4 per_channel lsq")
PEER = "torchao int4 group32"
SAMPLES, READ, HIDDEN, CLASSES = 256, 4, 256, 10
#: Different batches, one after another, as an epoch has them.
BATCHES = 64
#: Seconds of a turn.
TURN = 0.02


class Net(nn.Module):
    def __init__(self, table: nn.Module, columns: int) -> None:
        super().__init__()
        self.table = table
        self.head = nn.Sequential(nn.Linear(columns, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(index).mean(1))


def nets(rows: int, columns: int, index: torch.Tensor, sparse: bool) -> dict[str, Net]:
    """The float network, ours, and the peer's."""
    result = {"float": Net(nn.Embedding(rows, columns, sparse=sparse), columns)}
    for spec in SPECS:
        net = Net(nn.Embedding(rows, columns, sparse=sparse), columns)
        prepare(net, {"rules": [{"match": "table", "weight": spec}]})
        calibrate(net, [index])
        if isinstance(quantizer := net.table.weight_quantizer, LSQWeightQuantizer):
            quantizer.sparse_gradients = True
        result[spec] = net
    if not sparse and (peer := peers_table(rows, columns)) is not None:
        result[PEER] = Net(peer, columns)
    return result


def peers_table(rows: int, columns: int) -> nn.Module | None:
    """torchao's; it has no sparse gradients."""
    try:
        from torchao.quantization.qat import IntxFakeQuantizeConfig
        from torchao.quantization.qat.embedding import FakeQuantizedEmbedding
    except ImportError:
        return None
    return FakeQuantizedEmbedding(rows, columns, weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32))


def step_of(net: Net, batches: list[torch.Tensor], target: torch.Tensor) -> Callable[[], None]:
    read = itertools.cycle(batches)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(net(next(read)), target).backward()
        optimizer.step()

    return step


def evaluation_of(net: nn.Module, batches: list[torch.Tensor]) -> Callable[[], None]:
    read = itertools.cycle(batches)
    return lambda: net(next(read))


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds of a call, turn by turn: what runs again and again finds the caches as it left them."""
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(round(TURN / common.timed(function)), 1)

    def turn(name: str) -> None:
        for _ in range(calls[name]):
            functions[name]()

    times = common.interleaved({name: functools.partial(turn, name) for name in functions}, rounds)
    return {name: [seconds / calls[name] for seconds in found] for name, found in times.items()}


def measure(rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each network."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, rows, (SAMPLES, READ), generator=generator) for _ in range(BATCHES)]
    target = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    dense, sparse = (nets(rows, columns, batches[0], kind) for kind in (False, True))
    times = {}
    for what, held in (("step", dense), ("sparse step", sparse)):
        steps = {name: step_of(net.train(), batches, target) for name, net in held.items()}
        times[what] = in_turns(steps, rounds)
    with torch.no_grad():
        for net in dense.values():
            net.eval()
        times["evaluation"] = in_turns({name: evaluation_of(net, batches) for name, net in dense.items()}, rounds)
        times["layer"] = in_turns({name: evaluation_of(net.table, batches) for name, net in dense.items()}, rounds)
    result = []
    for name in dense:
        row: dict[str, Any] = {"rows": rows, "columns": columns, "name": name}
        for what, seconds in times.items():
            if name in seconds:
                row[what] = round(common.ratio(seconds, name, "float")["ratio"], 3)
                row[f"{what} microseconds"] = round(1e6 * min(seconds[name]), 1)
        result.append(row)
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser: argparse.ArgumentParser = common.parser(__doc__, data=False)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1_000, 30_000, 300_000], metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--columns", type=int, nargs="+", default=[32, 256], metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    common.start(options)
    results: dict[str, Any] = {"read": SAMPLES * READ, "results": []}
    for columns in options.columns:
        for rows in options.rows:
            results["results"] += measure(rows, columns, options.rounds)
            common.write_json(options.json, results, ("torchao",))
    Console().print(table(results))
    return results


def table(results: dict[str, Any]) -> Table:
    """Times over those of the float network."""
    found = Table(title=f"{results['read']:,} rows of a table, time over that of float")
    kinds = ("step", "sparse step", "evaluation", "layer")
    for column in ("rows", "columns", "table", *kinds):
        found.add_column(column, justify="left" if column == "table" else "right")
    for row in results["results"]:
        found.add_row(
            f"{row['rows']:,}",
            str(row["columns"]),
            row["name"],
            *(f"{row[kind]:.2f}" if kind in row else "-" for kind in kinds),
        )
    return found


if __name__ == "__main__":
    main()
