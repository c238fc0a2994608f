"""Accuracy of ResNet-20 on CIFAR-10 after quantization without training: bits x range estimator.

    python -m benchmarks.ptq_accuracy --json out.json
    python -m benchmarks.ptq_accuracy --model transformer --json out.json      # benchmarks.ptq_transformer

All layers are quantized, also the first and the last: weights per channel, inputs per tensor, nearest
rounding, batch norm corrected. A row's estimator finds the ranges of weights and inputs alike. The recipe was chosen on
train images 10,000 to 12,000, with `mse` the best estimator at 4 and 8 bits; the test images only score it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks import common, ptq_transformer
from benchmarks.peers import PEERS, PeerError, measure_peers, require
from benchmarks.vit import load_vit
from lq_plugin import QuantPlan, QuantSpec, Rule, calibrate, prepare
from lq_plugin.demo.cifar10 import load_images, normalize
from lq_plugin.demo.resnet import load_resnet
from lq_plugin.errors import SpecError
from lq_plugin.model import collect_statistics, weight_samples
from lq_plugin.model.prepare import quantizers
from lq_plugin.ptq.batch_norm.correct import correct_batch_norm
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.ranges import estimate_range
from lq_plugin.ranges.laboratory import COMPARED

#: What learns its roundings together.
UNITS = {"adaround": "layer", "brecq": "block"}
ROUNDINGS = (*UNITS, "gptq", "gptaq")
#: Bits of weights and of inputs.
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W3A8": (3, 8), "W2A8": (2, 8)}
CALIBRATION_IMAGES = 1024
BATCH_SIZE = 128


def specs(bits: str, range_name: str, affine_weights: bool = False) -> tuple[str, str]:
    """Weight spec and input spec of a row: of its bits, or of a format for the weights, with inputs of 8 bits.

    >>> specs("W4A8", "mse")
    ('int4 per_channel mse', 'uint8 affine mse')
    >>> specs("mxfp4", "mse")
    ('mxfp4', 'uint8 affine mse')
    """
    if bits not in BITS:
        return bits, f"uint8 affine {range_name}"
    weight_bits, input_bits = BITS[bits]
    affine = " affine" if affine_weights else ""
    return f"int{weight_bits} per_channel{affine} {range_name}", f"uint{input_bits} affine {range_name}"


def quantized(
    model: nn.Module,
    weight: str,
    inputs: str,
    batches: list[Tensor],
    rounding: str = "nearest",
    iterations: int = 0,
    seed: int = 0,
) -> nn.Module:
    """A quantized copy of a float model: all that a user's PTQ run does."""
    result = copy.deepcopy(model)
    prepare(result, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(result, batches)
    if rounding == "nearest":
        correct_batch_norm(result, batches)
    elif rounding not in UNITS:
        gptq(result, batches, asymmetric=rounding == "gptaq")
    else:
        # It corrects the batch norms of each unit itself.
        reconstruct(result, batches, by=UNITS[rounding], iterations=iterations, seed=seed)
    return result


def all_estimates(model: nn.Module, batches: list[Tensor], ranges: tuple[str, ...] = COMPARED) -> int:
    """Every estimator for every input and weight of a prepared model, from one pass; how many ranges that were."""
    grids = {quantizer.name: quantizer.spec.grid for quantizer in quantizers(model)}
    samples = {name: histogram.sample() for name, histogram in collect_statistics(model, batches).items()}
    samples |= weight_samples(model)
    bounds = [estimate_range(name, sample, grids[key]) for key, sample in samples.items() for name in ranges]
    return sum(minimum.numel() for minimum, _ in bounds)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right predictions in percent."""
    with torch.inference_mode():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
    return 100.0 * right / len(labels)


def forward_pass(model: nn.Module, batches: list[Tensor]) -> None:
    """The unit that calibration is measured in: the float model over the calibration images."""
    with torch.inference_mode():
        for batch in batches:
            model(batch)


def measure_rows(
    model: nn.Module,
    calibration: list[list[Tensor]],
    test: tuple[Tensor, Tensor],
    rows: list[tuple[str, str, str, str]],
) -> Iterator[dict[str, Any]]:
    """Score `(bits, range, weight spec, input spec)` rows as they are done; several calibration sets are averaged."""
    for bits, name, weight, inputs in rows:
        scores, seconds, passes = [], [], []
        for batches in calibration:
            with common.Stopwatch() as watch:
                forward_pass(model, batches)
            passes.append(watch.seconds)
            with common.Stopwatch() as watch:
                result = quantized(model, weight, inputs, batches)
            seconds.append(watch.seconds)
            scores.append(accuracy(result, *test))
        yield {
            "bits": bits,
            "range": name,
            "rounding": "nearest",
            "accuracy": round(statistics.mean(scores), 3),
            "seconds": statistics.median(seconds),
            "forward_pass_seconds": statistics.median(passes),
            "accuracies": scores,
            "weight": weight,
            "input": inputs,
        }


def measure_reconstruction(
    model: nn.Module,
    calibration: list[list[Tensor]],
    test: tuple[Tensor, Tensor],
    bits: list[str],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Score learned rounding: a row for each width and way, with the curve of accuracy over iterations.

    Each calibration set comes with a random seed of its own; they are averaged.
    """
    for rounding in options.rounding:
        for width in bits:
            weight, inputs = specs(width, "mse", options.affine_weights)
            curve: list[list[float]] = []
            for iterations in options.iterations if rounding in UNITS else [0]:
                scores, seconds, passes = [], [], []
                for seed, batches in enumerate(calibration):
                    with common.Stopwatch() as watch:
                        forward_pass(model, batches)
                    passes.append(watch.seconds)
                    with common.Stopwatch() as watch:
                        result = quantized(model, weight, inputs, batches, rounding, iterations, seed)
                    seconds.append(watch.seconds)
                    scores.append(accuracy(result, *test))
                curve.append([iterations, round(statistics.mean(scores), 3), statistics.median(seconds)])
            yield {
                "bits": width,
                "range": "mse",
                "rounding": rounding,
                "iterations": curve[-1][0],
                "accuracy": curve[-1][1],
                "seconds": curve[-1][2],
                "forward_pass_seconds": statistics.median(passes),
                "accuracies": scores,
                "curve": curve,
                "weight": weight,
                "input": inputs,
            }


def add_won_back(results: dict[str, Any]) -> None:
    """Adds to rows of learned rounding the share of nearest rounding's loss that they win back, in percent."""
    nearest = {row["bits"]: row["accuracy"] for row in results["results"] if row["rounding"] == "nearest"}
    for row in results["results"]:
        loss = results["float"] - nearest.get(row["bits"], results["float"])
        if row["rounding"] != "nearest" and loss > 0:
            row["won_back"] = round(100 * (row["accuracy"] - nearest[row["bits"]]) / loss, 1)


def measure_calibration(model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """Returns the cost of all estimators together, in plain forward passes over the same images."""
    prepared = copy.deepcopy(model)
    prepare(prepared, QuantPlan([Rule("*", weight="int4 per_channel", input="uint4 affine")]))
    times = common.interleaved(
        {
            "forward_pass": lambda: forward_pass(model, batches),
            "one_pass": lambda: collect_statistics(prepared, batches),
            "all_estimators": lambda: all_estimates(prepared, batches),
        },
        rounds=5,
    )
    return {
        "images": sum(map(len, batches)),
        "batch_size": BATCH_SIZE,
        "estimators": list(COMPARED),
        "forward_pass_seconds": statistics.median(times["forward_pass"]),
        "statistics_over_forward_pass": common.ratio(times, "one_pass", "forward_pass"),
        "all_estimators_over_forward_pass": common.ratio(times, "all_estimators", "forward_pass"),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--bits", nargs="+", choices=BITS, help="widths to measure (default: all, none with --formats)")
    parser.add_argument(
        "--formats", nargs="+", type=_spec, default=[], metavar="SPEC", help="of weights, next to 8-bit inputs: mxfp4"
    )
    parser.add_argument(
        "--ranges", nargs="+", choices=COMPARED, default=list(COMPARED), help="estimators (default: all)"
    )
    parser.add_argument(
        "--rounding", nargs="+", choices=ROUNDINGS, default=[], help="learn the rounding too (default: nearest only)"
    )
    parser.add_argument(
        "--iterations", nargs="+", type=int, default=[100, 300, 1000], metavar="N", help="of learned rounding, a curve"
    )
    parser.add_argument("--affine-weights", action="store_true", help="weights with zero points (default: symmetric)")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="average over N disjoint calibration sets (default: 1)"
    )
    parser.add_argument(
        "--weights", default="resnet_cifar10/resnet20_jpeg.safetensors", metavar="FILE", help="below --data, or a path"
    )
    parser.add_argument(
        "--test-images", type=int, metavar="N", help="score on the first N test images only (default: all)"
    )
    parser.add_argument(
        "--model",
        choices=("resnet", "vit", "transformer"),
        default="resnet",
        help="vit: the one of benchmarks.vit, trained first; transformer: has options of its own, see its --help",
    )
    parser.add_argument(
        "--depth", type=int, default=20, help="layers of the ResNet that the weights are for (default: 20)"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=[n for n, peer in PEERS.items() if peer.default_iterations],
        default=[],
        help="other libraries in the same run; see benchmarks.peers",
    )
    parser.add_argument(
        "--peer-default", action="store_true", help="peers at their own default of iterations as well: slow"
    )
    options = parser.parse_args(arguments)
    if options.bits is None:
        options.bits = [] if options.formats else list(BITS)
    if options.peers and options.model != "resnet":
        parser.error("--peers goes with --model resnet only")
    try:
        require(options.peers)
    except PeerError as error:
        raise SystemExit(f"--peers: {error}") from error
    return options


def _spec(text: str) -> str:
    try:
        return str(QuantSpec.parse(text))
    except SpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--model")
    if chosen.parse_known_args(arguments)[0].model == "transformer":
        return ptq_transformer.main(arguments)
    options = parse(arguments)
    common.start(options)
    console = Console()
    vit = options.model == "vit"
    model = load_vit(options.data, console) if vit else load_resnet(options.data / options.weights, options.depth)
    train, _ = load_images(options.data, "train", 0, options.seeds * CALIBRATION_IMAGES)
    calibration = [list(part.split(BATCH_SIZE)) for part in normalize(train).split(CALIBRATION_IMAGES)]
    images, labels = load_images(options.data, "test", 0, options.test_images)
    test = normalize(images), labels
    results: dict[str, Any] = {
        "model": "ViT" if vit else f"ResNet-{options.depth}",
        "float": accuracy(model, *test),
        "test_images": len(labels),
        "calibration": measure_calibration(model, calibration[0]),
        "results": [],
    }
    widths = [*options.bits, *options.formats]
    for row in measure_reconstruction(model, calibration, test, widths, options):
        results["results"].append(row)
        common.write_json(options.json, results)
        console.print(f"{row['bits']} {row['rounding']}: {row['curve']}", highlight=False)
    for row in measure_peers(
        options.peers,
        options.bits,
        weights=options.data / options.weights,
        data=options.data,
        seeds=options.seeds,
        images=CALIBRATION_IMAGES,
        default=options.peer_default,
        depth=options.depth,
        scored=("test", 0, options.test_images),
        batch_size=BATCH_SIZE,
        threads=options.threads,
    ):
        results["results"].append(row)
        common.write_json(options.json, results)
        console.print(f"{row['bits']} {row['rounding']}: {row['curve']}", highlight=False)
    rows = [(bits, name, *specs(bits, name, options.affine_weights)) for bits in widths for name in options.ranges]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("quantizing", total=len(rows))
        for row in measure_rows(model, calibration, test, rows):
            results["results"].append(row)
            progress.update(task, advance=1, description=f"{row['bits']} {row['range']} {row['accuracy']:.2f} %")
    add_won_back(results)
    common.write_json(options.json, results)
    console.print(table(results))
    return results


def table(results: dict[str, Any]) -> Table:
    """Estimators down, widths across, the best of a width in bold."""
    rows = results["results"]
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    best = {width: max(row["accuracy"] for row in rows if row["bits"] == width) for width in widths}
    ratio = results["calibration"]["all_estimators_over_forward_pass"]["ratio"]
    result = Table(
        title=f"{results['model']}, CIFAR-10: float {results['float']:.2f} %",
        caption=f"all estimators: {ratio:.2f} forward passes",
    )
    result.add_column("range")
    for width in widths:
        result.add_column(width, justify="right")
    for rounding, name in dict.fromkeys((row["rounding"], row["range"]) for row in rows):
        scores = {row["bits"]: row["accuracy"] for row in rows if (row["rounding"], row["range"]) == (rounding, name)}
        cells = [
            f"[bold]{scores[w]:.2f}[/]" if scores[w] == best[w] else f"{scores[w]:.2f}" for w in widths if w in scores
        ]
        result.add_row(name if rounding == "nearest" else rounding, *cells)
    return result


if __name__ == "__main__":
    main()
