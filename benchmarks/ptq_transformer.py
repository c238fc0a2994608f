"""Quality of a pretrained transformer after quantization without training: plans x methods.

    python -m benchmarks.ptq_accuracy --model transformer --seeds 3 --json out.json

The masked language model of `benchmarks.transformer`, its 72 linear layers quantized, embeddings and the tied output
layer float. 500 reactions with fixed masks score it, each calibration set is of 128 others. Beside accuracy and loss
(the mean negative log-likelihood of the masked tokens) a row has the Kullback-Leibler divergence of the quantized
model's predictions from the float model's. It is the loss that quantization adds where the float model's probabilities
are right, without the noise of which tokens came (a difference of two losses has the noise of both).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import common, transformer
from benchmarks.peers.environments import is_installed
from benchmarks.peers.llmcompressor_transformer import METHODS as PEER_METHODS, PLANS as PEER_PLANS
from benchmarks.peers.process import PeerProcess
from benchmarks.transformer import Masked, predictions, scores
from lq_plugin import QuantPlan, Rule
from lq_plugin.ptq import run_phases

#: Specs of weights and inputs, by plan.
PLANS: dict[str, tuple[str, str | None]] = {
    "W8A8 static": ("int8 per_channel", "uint8 affine mse"),
    "W8A8 dynamic": ("int8 per_channel", "uint8 per_token affine dynamic"),
    "W4 g32": ("int4 group32 mse", None),
    "MXFP4": ("mxfp4", None),
    "NVFP4": ("nvfp4", None),
    "MX6": ("mx6", "mx6"),
}
#: Phases, by method; a method with iterations learns.
METHODS: dict[str, list[Any]] = {
    "nearest": ["calibrate"],
    "smooth": ["smooth_quant", "calibrate"],
    "rotate": ["rotate", "calibrate"],
    "gptq": ["calibrate", "gptq"],
    "gptaq": ["calibrate", {"gptq": {"asymmetric": True}}],
    "gptq sweeps": ["calibrate", {"gptq": {"sweeps": 3}}],
    "gptaq sweeps": ["calibrate", {"gptq": {"asymmetric": True, "sweeps": 3}}],
    "smooth gptq": ["smooth_quant", "calibrate", "gptq"],
    "rotate gptq": ["rotate", "calibrate", "gptq"],
    "adaround": ["calibrate", {"reconstruct": {"by": "layer"}}],
    # Its sums are in modules with a layer each, so that "block" would find none.
    "brecq": ["calibrate", {"reconstruct": {"by": ["bert.encoder.layer.*"]}}],
}
LAYERS = "bert.encoder.*"
PEERS = ("llmcompressor",)


def quantized(model: nn.Module, plan: str, method: str, batches: list[Masked], iterations: int, seed: int) -> nn.Module:
    """Returns a quantized copy of a float model.

    Args:
        model: float.
        plan: a key of `PLANS`.
        method: a key of `METHODS`.
        batches: to calibrate with.
        iterations, seed: of learned rounding.
    """
    weight, inputs = PLANS[plan]
    result = copy.deepcopy(model)
    learns = {"iterations": iterations, "seed": seed}
    phases = [
        {name: {**options, **learns} if name == "reconstruct" else options for name, options in phase.items()}
        if isinstance(phase, dict)
        else phase
        for phase in METHODS[method]
    ]
    run_phases(
        result,
        QuantPlan([Rule(LAYERS, weight=weight, input=inputs)]),
        batches,
        phases,
        lambda batch: result(**batch.inputs),
    )
    return result


def measure(
    model: nn.Module,
    calibration: list[list[Masked]],
    test: list[Masked],
    wanted: list[tuple[str, str]],
    iterations: int,
) -> Iterator[dict[str, Any]]:
    """Scores plans with methods, a row as it is done; means over the calibration sets, each a seed.

    Args:
        model: float.
        calibration, test: batches.
        wanted: plans and methods.
        iterations: of learned rounding.
    """
    reference, tokens = predictions(model, test), torch.cat([batch.tokens for batch in test])
    yield {"plan": "float", "method": "", **scores(reference, reference, tokens)}
    for plan, method in wanted:
        found, seconds = [], []
        # The weights of nearest rounding do not depend on data, nor do ranges at run time.
        alike = method == "nearest" and plan != "W8A8 static"
        for seed, batches in enumerate(calibration[:1] if alike else calibration):
            with common.Stopwatch() as watch:
                result = quantized(model, plan, method, batches, iterations, seed)
            seconds.append(watch.seconds)
            found.append(scores(predictions(result, test), reference, tokens))
        yield row_of(plan, method, found, seconds)


def measure_peers(name: str, wanted: list[tuple[str, str]], seeds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Scores a peer as `measure` does ours.

    Args:
        name: of the peer.
        wanted: plans and methods of the peer.
        seeds: calibration sets.
        threads: of torch.
    """
    if not wanted:
        return
    process = PeerProcess(name, f"benchmarks.peers.{name}_transformer", (str(seeds),), threads)
    for plan, method in wanted:
        found = [process.ask(f"{plan} {method} {seed}") for seed in range(seeds)]
        yield row_of(plan, f"{name} {method}", found, [score.pop("seconds") for score in found])
    process.close()


def row_of(plan: str, method: str, found: list[dict[str, float]], seconds: list[float]) -> dict[str, Any]:
    """Returns a row of the results.

    Args:
        plan, method: what was measured.
        found: scores of each calibration set.
        seconds: of each.
    """
    return {
        "plan": plan,
        "method": method,
        **{key: statistics.mean(score[key] for score in found) for key in found[0]},
        "divergences": [score["divergence"] for score in found],
        "losses": [score["loss"] for score in found],
        "seconds": statistics.median(seconds),
        "weight": PLANS[plan][0],
        "input": PLANS[plan][1],
    }


def kept_rows(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a file of results that was made with the same settings, without that of the float model."""
    if path is None:
        raise SystemExit("--add adds to the file of --json")
    before = json.loads(path.read_text(encoding="utf-8"))
    if others := [key for key, value in settings.items() if key != "results" and before.get(key) != value]:
        raise SystemExit(f"--add: {path} was made with another {', '.join(others)}")
    return [row for row in before["results"] if row["method"]]


def add_won_back(rows: list[dict[str, Any]]) -> None:
    """Adds the share of our nearest rounding's divergence that the other methods win back, in percent."""
    nearest = {row["plan"]: row["divergence"] for row in rows if row["method"] == "nearest"}
    for row in rows:
        if row["method"] not in ("", "nearest") and nearest.get(row["plan"]):
            row["won_back"] = round(100 * (1 - row["divergence"] / nearest[row["plan"]]), 1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__, data=False)
    parser.add_argument("--model", choices=("transformer",), default="transformer", help=argparse.SUPPRESS)
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), metavar="PLAN", help=", ".join(PLANS))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--iterations", type=int, default=100, metavar="N", help="of learned rounding (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="disjoint calibration sets (default: 3)")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=[name for name in PEERS if is_installed(name)],
        help="beside it (default: those that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--peer-methods", nargs="+", choices=PEER_METHODS, default=["nearest", "gptq"],
        help="of the peers (default: nearest gptq)",
    )  # fmt: skip
    parser.add_argument("--add", action="store_true", help="keep the rows of the --json file, and measure the others")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    console = Console()
    model, calibration, test = transformer.load_all(options.seeds)
    results: dict[str, Any] = {
        "model": transformer.MODEL,
        "data": transformer.DATA,
        "test_reactions": transformer.TEST,
        "masked_tokens": sum(len(batch.tokens) for batch in test),
        "calibration_reactions": transformer.CALIBRATION,
        "seeds": options.seeds,
        "iterations": options.iterations,
        "results": [],
    }
    kept = kept_rows(options.json, results) if options.add else []
    done = {(row["plan"], row["method"]) for row in kept}
    wanted = [pair for plan in options.plans for method in options.methods if (pair := (plan, method)) not in done]
    rows = measure(model, calibration, test, wanted, options.iterations)
    results["results"] = [next(rows), *kept]
    theirs = [
        measure_peers(
            name,
            [
                (p, m)
                for p in options.plans
                if p in PEER_PLANS
                for m in options.peer_methods
                if (p, f"{name} {m}") not in done
            ],
            options.seeds,
            options.threads,
        )
        for name in options.peers
    ]
    for row in chain(rows, *theirs):
        results["results"].append(row)
        results["results"].sort(key=lambda row: list(PLANS).index(row["plan"]) if row["method"] else -1)
        add_won_back(results["results"])
        common.write_json(options.json, results)
        console.print(f"{row['plan']} {row['method']}: {row['divergence'] * 1000:.4f}", highlight=False)
    console.print(table(results["results"]))
    return results


def table(rows: list[dict[str, Any]]) -> Table:
    """Methods down, plans across: divergence in thousandths of a nat, and the share won back."""
    reference, *others = rows
    result = Table(
        title=f"divergence, 1/1000 nat; float: accuracy {reference['accuracy']:.2f} %, loss {reference['loss']:.4f}"
    )
    result.add_column("method")
    plans = list(dict.fromkeys(row["plan"] for row in others))
    for plan in plans:
        result.add_column(plan, justify="right")
    for method in dict.fromkeys(row["method"] for row in others):
        cells = {row["plan"]: row for row in others if row["method"] == method}
        result.add_row(
            method,
            *(
                f"{1000 * cells[p]['divergence']:.3f}"
                + (f" ({cells[p]['won_back']:.0f} %)" if "won_back" in cells[p] else "")
                if p in cells
                else ""
                for p in plans
            ),
        )
    return result


if __name__ == "__main__":
    main()
