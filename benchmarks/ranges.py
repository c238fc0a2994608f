"""Cost of finding a range: counting the values of an activation, and each estimator on it and on a weight.

    python -m benchmarks.ranges --estimators kl --beside d2334b0 --json out.json

`count` takes one batch of two million values into the collector that the estimator asks for; `activation` makes the
range of a histogram of a million values, its sample included; `weight` the ranges of 64 channels of 4,608 values each.
`--beside REV` measures the library also as it was at a commit of this repository: both run in processes of their own
that take their turns, on the same numbers, and `ratio` is that of medians, here over there. Seconds are those of the
processor, so that what else runs on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_DISTRIBUTIONS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n),
    "laplace": lambda n: torch.distributions.Laplace(0.0, 1.0).sample((n,)),
    "relu": lambda n: torch.randn(n).relu(),
}
#: What is measured: kind, spec without its range, distribution.
CASES = (
    ("count", "int8", "normal"),
    ("count", "uint8", "relu"),
    ("activation", "int8", "normal"),
    ("activation", "int8", "laplace"),
    ("activation", "uint8 affine", "normal"),
    ("activation", "uint8", "relu"),
    ("activation", "uint4", "relu"),
    ("activation", "int4", "laplace"),
    ("weight", "int8 per_channel", "normal"),
    ("weight", "int8 per_channel", "laplace"),
    ("weight", "int4 per_channel", "normal"),
    ("weight", "int4 per_channel", "laplace"),
)
_COUNTED, _SEEN, _WEIGHT = 2_000_000, 1_000_000, (64, 4608)
#: Calls of one measurement: its seconds are those of the fastest.
_CALLS = 3


def work(kind: str, spec: str, values: str, estimator: str) -> Callable[[], Any]:
    """Returns the call that is timed, with everything before it done; by names that earlier builds know as well."""
    from lq_plugin import QuantSpec, prepare
    from lq_plugin.ranges import Sample, estimate_range

    torch.manual_seed(0)
    grid = QuantSpec.parse(spec).grid
    if kind == "weight":
        weight = _DISTRIBUTIONS[values](_WEIGHT[0] * _WEIGHT[1]).view(_WEIGHT)
        return lambda: estimate_range(estimator, Sample.from_tensor(weight), grid)
    net = nn.Sequential(nn.Linear(1, 1))
    prepare(net, {"rules": [{"match": "*", "weight": "int8", "input": f"{spec} {estimator}"}]})
    (quantizer,) = (module for module in net.modules() if hasattr(module, "new_collector"))
    collector = quantizer.new_collector()
    if kind == "count":
        batch = _DISTRIBUTIONS[values](_COUNTED)
        return lambda: collector.update(batch)
    collector.update(_DISTRIBUTIONS[values](_SEEN))
    return lambda: estimate_range(estimator, collector.sample(), grid)


def name_of(kind: str, spec: str, values: str, estimator: str) -> str:
    """Returns how a row is called."""
    return f"{estimator}: {kind} {spec}, {values}"


def answering(estimators: list[str]) -> dict[str, Callable[[], Any]]:
    """Returns the functions that the process of a commit serves: the seconds of a call, by name of the row."""

    def timed(call: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(_CALLS):
            before = time.process_time()
            call()
            seconds.append(time.process_time() - before)
        return min(seconds)

    rows = [(*case, estimator) for estimator in estimators for case in CASES]
    calls = {name_of(*row): work(*row) for row in rows}
    return {name: lambda call=call: timed(call) for name, call in calls.items()}  # type: ignore[misc]


def measure(estimators: list[str], revision: str | None, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Returns a row for each case: median seconds here, and at a commit."""
    from benchmarks.earlier import tree_of
    from benchmarks.peers.process import AnsweringProcess
    from benchmarks.peers.start import ROOT, environment

    def started(tree: Path) -> AnsweringProcess:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(threads), *estimators]
        return AnsweringProcess(command, tree, {**environment(threads), "PYTHONPATH": str(tree)})

    with tree_of(revision) as tree:
        processes = {"here": started(ROOT)} | ({} if tree is None else {"beside": started(tree)})
        try:
            rows = []
            for name in processes["here"].names:
                seconds: dict[str, list[float]] = {side: [] for side in processes}
                for turn in range(rounds + 1):
                    for side in reversed(processes) if turn % 2 else processes:
                        found = float(processes[side].ask(name))
                        if turn:  # the first one loads what is loaded once
                            seconds[side].append(found)
                rows.append(_row(name, seconds))
        finally:
            for process in processes.values():
                process.close()
    return rows


def _row(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    from benchmarks import common

    row: dict[str, Any] = {"name": name} | {side: statistics.median(found) for side, found in seconds.items()}
    return row | (common.ratio(seconds, "here", "beside") if "beside" in seconds else {})


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        from benchmarks.peers.process import serve

        torch.set_num_threads(int(sys.argv[2]))
        serve(lambda: answering(sys.argv[3:]))
        return
    from benchmarks import common

    options = parse()
    common.start(options)
    rows = measure(options.estimators, options.beside, options.rounds, options.threads)
    for row in rows:
        line = f"{row['name']:44} {row['here'] * 1e3:8.3f} ms"
        if "beside" in row:
            line += f"   {options.beside}: {row['beside'] * 1e3:8.3f} ms"
            line += f"   {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        sys.stdout.write(line + "\n")
    common.write_json(options.json, {"beside": options.beside, "rows": rows})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    from benchmarks import common

    parser = common.parser(__doc__, data=False)
    parser.add_argument("--estimators", nargs="+", default=["kl"], metavar="NAME", help="to measure (%(default)s)")
    parser.add_argument("--beside", metavar="REV", help="measure a commit of this repository as well")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="that are timed (default: 11)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
