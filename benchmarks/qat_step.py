"""Time and memory of a quantized training step over the float step, with other libraries in the same run.

    python -m benchmarks.qat_step --json out.json
    python -m benchmarks.qat_step --precision bf16-mixed    under autocast, over the float step under autocast
    python -m benchmarks.qat_step --beside REV --processes 8    steps of lq over those of lq at a commit, see below

A step is forward, loss, backward, SGD with momentum, and what `QAT` does after each batch (ranges move). Every layer is
quantized, weights per channel and inputs per tensor; the settings W8A8, W4A8 and W4A4 follow the input by a moving
average, LSQ learns all steps at 4 bits. By name: MX6, MXFP8, MXFP4, NVFP4, VS (two-level scales), BNN (signs), TTQ
(8-bit inputs). `ratio` is the median of steps over that of float steps, which run in turn in the same process; `low`
and `high` are the smallest and largest ratio within one round. The models: r20, ResNet-20 on 128 images of 32 × 32;
r18, ResNet-18 on 16 images of 112 × 112; encoder, four `nn.TransformerEncoderLayer`s of 384 features on 16 × 128
tokens. Data and weights are random.

`saved_mb` is what autograd keeps between forward and backward: the bytes (/ 10^6) of every storage that
`torch.autograd.graph.saved_tensors_hooks` sees, each once. A float step keeps its weights, a quantized one its
quantized weights; `saved_without_parameters_mb` leaves parameters and buffers of the model out, which are there anyway.

Implementations: `lq pure`, torch operations alone; `lq native`, the compiled kernels; `lq integer`, `QAT(...,
forward="integer")`; `lq compiled`, torch.compile of the whole model, over the float step that is *not* compiled (`float
compiled` stands next to it); `torch.ao`, its fused moving-average fake-quantizers on each convolution and linear layer
(attention keeps its projection of query, key and value float); `torchao QATConfig` (linear layers only), `torchao
MXTensor` (linear layers outside of attention only, its tensors there and back) and `torchao pt2e`; Brevitas, where it
is installed (`python -m benchmarks.peers install brevitas`), a process in its own environment that takes its turn:
`brevitas collecting`, its first 300 steps, and `brevitas learned`, what comes after them. What raises in a precision is
a row with the error. `ratio_over_float_compiled` of `lq compiled` is that over the compiled float step.

With `--beside REV` the implementations `lq ...` alone are measured, here and as they were at a commit. Steps of one
build differ from process to process, by where its memory lies, more than builds do. So `--processes` pairs of fresh
processes are started one after the other; the two of a pair take turns step by step, and the order changes from pair to
pair. `ratio` is the median over processes of each process's median step, here over there; `low` and `high` are the
quartiles of the ratios within pairs, and `medians` all medians in seconds. `--beside HEAD` shows what a run can tell
apart.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import common
from benchmarks.earlier import StepOf, tree_of
from benchmarks.peers.environments import PeerError
from benchmarks.peers.training import PeerStep
from benchmarks.qat_step_models import CLOCKS, MODELS, PRECISIONS, Step, float_step, in_precision
from benchmarks.qat_step_rivals import FORMATS, IMPLEMENTATIONS, PEERS, TOLD, Unavailable

SETTINGS = ("W8A8", "W4A8", "W4A4", "LSQ")
#: Also: on processors without VNNI instructions, 7 bits are what an integer forward pass can take.
OTHERS = ("W7A8", *FORMATS)


def measure(model: str, setting: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each implementation that has this setting, and one for float."""
    precision, common_keys = options.precision, {"model": model, "setting": setting, "precision": options.precision}
    steps: dict[str, Step | PeerStep] = {"float": in_precision(float_step(model, options.device), precision)}
    skipped: list[dict[str, Any]] = []
    for name in options.implementations:
        try:
            steps[name] = started(name, model, setting, options)
        except Unavailable as reason:
            why = {"ratio": None, "saved_mb": None, "why": str(reason)}
            skipped.append({**common_keys, "implementation": name, **why})
    times = interleaved(steps, options.rounds, options.warm_up, options.clock)
    rows = []
    for name, step in steps.items():
        row = {**common_keys, "implementation": name, **common.ratio(times, name, "float")}
        if name == "lq compiled" and "float compiled" in times:
            row["ratio_over_float_compiled"] = common.ratio(times, name, "float compiled")["ratio"]
        saved, added = (size / 1e6 for size in step.saved())
        rows.append(
            {**row, "seconds": statistics.median(times[name]), "saved_mb": saved, "saved_without_parameters_mb": added}
        )
        if isinstance(step, PeerStep):
            step.close()
    return rows + skipped


def measure_beside(model: str, setting: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each of our implementations, over the same at the commit `options.beside`."""
    rows = []
    for name in [name for name in options.implementations if name.startswith("lq ")]:

        def start(tree: Path | None, name: str = name) -> StepOf:
            return StepOf(tree, name, model, setting, torch.get_num_threads(), options.precision)

        row = {"model": model, "setting": setting, "precision": options.precision, "implementation": name}
        try:
            rows.append(row | compare(start, options))
        except PeerError as error:
            why = str(error).strip().splitlines()[-1]
            if not any(word in why for word in ("Unavailable", "KeyError")):  # one of the builds has no such setting
                raise
            rows.append(row | {"ratio": None, "why": why})
    return rows


def compare(start: Callable[[Path | None], Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns `ratio`, `low`, `high` and `medians` of fresh pairs of processes; see the head of this file.

    Args:
        start: returns the step of a tree in a new process; None is this one.
        options: with `processes`, `tree`, `beside`, `rounds`, `warm_up` and `clock`.
    """
    medians: dict[str, list[float]] = {"here": [], options.beside: []}
    for index in range(options.processes):
        builds = [("here", None), (options.beside, options.tree)]
        with ExitStack() as stack:
            steps: dict[str, Any] = {}
            for name, tree in reversed(builds) if index % 2 else builds:
                steps[name] = start(tree)
                stack.callback(steps[name].close)
            for name, times in interleaved(steps, options.rounds, options.warm_up, options.clock).items():
                medians[name].append(statistics.median(times))
    here, there = medians.values()
    low, _, high = quartiles([mine / other for mine, other in zip(here, there, strict=True)])
    ratio = statistics.median(here) / statistics.median(there)
    return {"ratio": ratio, "low": low, "high": high, "medians": medians}


def quartiles(values: list[float]) -> list[float]:
    """Returns the first quartile, the median and the third quartile; of one value, that value."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def started(name: str, model: str, setting: str, options: argparse.Namespace) -> Step | PeerStep:
    """The step of an implementation, run once.

    Raises:
        Unavailable: it has no such setting; or, of other libraries, with the error that it raises in this precision.
    """
    make, precision = IMPLEMENTATIONS[name], options.precision
    step = make(model, setting, options.device, *([precision] if name in TOLD else []))
    if name not in PEERS:
        step = in_precision(step, precision)
    try:
        step.seconds(options.clock)
    except Exception as error:
        if precision == "32-true" or name.startswith(("lq ", "float ")):
            raise
        raise Unavailable(f"raises {type(error).__name__}: {str(error).strip().splitlines()[-1]}") from error
    return step


def interleaved(steps: Mapping[str, Step | PeerStep], rounds: int, warm_up: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each step, round by round; every second round runs in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warm_up + rounds):
        for name in reversed(steps) if index % 2 else steps:
            seconds = steps[name].seconds(clock)
            if index >= warm_up:
                times[name].append(seconds)
    return times


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__, data=False)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="to measure (default: all)"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=(*SETTINGS, *OTHERS),
        default=list(SETTINGS),
        help=f"to measure (default: {' '.join(SETTINGS)})",
    )
    names = list(IMPLEMENTATIONS)
    parser.add_argument("--implementations", nargs="*", choices=names, default=names, help="to measure (default: all)")
    message = "of the steps, as the Trainer names it; the float step is in the same one (default: 32-true)"
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help=message)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="that are timed (default: 15)")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="rounds before (default: 2)")
    message = (
        "wall time, or CPU time of the process, which other processes disturb less (with one thread; default: wall)"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=message)
    parser.add_argument("--device", default="cpu", help="of the models (default: cpu)")
    parser.add_argument("--beside", metavar="REV", help="measure lq over lq at a commit of this repository")
    message = "pairs of fresh processes for --beside (default: 5)"
    parser.add_argument("--processes", type=int, default=5, metavar="N", help=message)
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes is 1 or more, got {options.processes}")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    results: dict[str, Any] = {"results": []}
    console = Console()
    with tree_of(options.beside) as options.tree:
        for model in options.models:
            for setting in options.settings:
                rows = (measure_beside if options.beside else measure)(model, setting, options)
                results["results"] += rows
                common.write_json(options.json, results, ("torchao",))
                console.print(table(rows, options.beside))
    return results


def table(rows: list[dict[str, Any]], beside: str | None) -> Table:
    title = " ".join(rows[0][key] for key in ("model", "setting", "precision"))
    if beside:
        shown = Table("", f"× step at {beside}", "quartiles", "", title=title)
    else:
        title = f"{title}: {rows[0]['seconds']:.3f} s"
        shown = Table("", "× float step", "low", "high", "saved MB", title=title)
    for row in rows:
        if row["ratio"] is None:
            shown.add_row(row["implementation"], row["why"])
        else:
            numbers = [f"{row[key]:.3f}" for key in ("ratio", "low", "high")]
            shown.add_row(row["implementation"], *numbers, *([] if beside else [f"{row['saved_mb']:.0f}"]))
    return shown


if __name__ == "__main__":
    main()
