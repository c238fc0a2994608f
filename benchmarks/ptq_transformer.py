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
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import common, transformer
from benchmarks.transformer import Masked
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
    "gptq": ["calibrate", "gptq"],
    "gptaq": ["calibrate", {"gptq": {"asymmetric": True}}],
    "smooth gptq": ["smooth_quant", "calibrate", "gptq"],
    "adaround": ["calibrate", {"reconstruct": {"by": "layer"}}],
    "brecq": ["calibrate", {"reconstruct": {"by": "block"}}],
}
LAYERS = "bert.encoder.*"
CALIBRATION, TEST, BATCH_SIZE = 128, 500, 32


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


def predictions(model: nn.Module, batches: list[Masked]) -> Tensor:
    """Returns the log-probabilities `[masked tokens, vocabulary]` that a model gives to what is masked."""
    with torch.inference_mode():
        return torch.cat([model(**batch.inputs).logits[batch.chosen].double().log_softmax(-1) for batch in batches])


def scores(found: Tensor, reference: Tensor, tokens: Tensor) -> dict[str, float]:
    """Returns what a model's predictions are worth.

    Args:
        found: log-probabilities of the model `[M, V]`.
        reference: those of the float model.
        tokens: the right ones `[M]`.

    Returns:
        Accuracy and agreement with the float model's choice in percent, loss and divergence in nats a token.

    >>> p = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    >>> scores(p, p.flip(1), torch.tensor([0, 0]))["divergence"]  # 0.5 * (0 + 0.5 * ln 3)
    0.27465...
    """
    divergence = (reference.exp() * (reference - found)).sum(1).mean()
    return {
        "accuracy": 100.0 * float((found.argmax(1) == tokens).double().mean()),
        "agreement": 100.0 * float((found.argmax(1) == reference.argmax(1)).double().mean()),
        "loss": -float(found.gather(1, tokens[:, None]).mean()),
        "divergence": float(divergence),
    }


def measure(
    model: nn.Module, calibration: list[list[Masked]], test: list[Masked], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Scores each plan with each method, a row as it is done; means over the calibration sets, each a seed."""
    reference, tokens = predictions(model, test), torch.cat([batch.tokens for batch in test])
    yield {"plan": "float", "method": "", **scores(reference, reference, tokens)}
    for plan in options.plans:
        for method in options.methods:
            found, seconds = [], []
            for seed, batches in enumerate(calibration):
                with common.Stopwatch() as watch:
                    result = quantized(model, plan, method, batches, options.iterations, seed)
                seconds.append(watch.seconds)
                found.append(scores(predictions(result, test), reference, tokens))
            yield {
                "plan": plan,
                "method": method,
                **{key: statistics.mean(score[key] for score in found) for key in found[0]},
                "divergences": [score["divergence"] for score in found],
                "losses": [score["loss"] for score in found],
                "seconds": statistics.median(seconds),
                "weight": PLANS[plan][0],
                "input": PLANS[plan][1],
            }


def add_won_back(rows: list[dict[str, Any]]) -> None:
    """Adds the share of nearest rounding's divergence that the other methods of a plan win back, in percent."""
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
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    console = Console()
    model, vocabulary, reactions = transformer.load_transformer()
    encoded = [row for row in (transformer.encode(r, vocabulary) for r in reactions) if len(row) <= transformer.LONGEST]
    needed = TEST + options.seeds * CALIBRATION
    if len(encoded) < needed:
        raise SystemExit(f"{needed} reactions are needed, there are {len(encoded)}")
    test = transformer.masked_batches(encoded[:TEST], vocabulary, BATCH_SIZE, 0)
    parts = [encoded[start : start + CALIBRATION] for start in range(TEST, needed, CALIBRATION)]
    calibration = [
        transformer.masked_batches(part, vocabulary, BATCH_SIZE, seed) for seed, part in enumerate(parts, start=1)
    ]
    results: dict[str, Any] = {
        "model": transformer.MODEL,
        "data": transformer.DATA,
        "test_reactions": TEST,
        "masked_tokens": sum(len(batch.tokens) for batch in test),
        "calibration_reactions": CALIBRATION,
        "seeds": options.seeds,
        "iterations": options.iterations,
        "results": [],
    }
    for row in measure(model, calibration, test, options):
        results["results"].append(row)
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
