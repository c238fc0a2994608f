"""Exported files in the runtimes of their targets, next to the model that they were made from and its float file.

    python -m benchmarks.targets --json out.json

ResNet-20 (CIFAR-10, public weights) at W8A8 and W4A8, a MobileNetV3-like net with random weights at W8A8, a Llama-like
model of two layers with random weights at int4 groups, GGUF's Q4_0 and Q8_0, MXFP4 and ternary:

    bytes              of the file, or of all files of a folder
    agreement          share of samples (tokens) whose largest logit is that of the fake-quantized model
    within_one_step    share of outputs that differ by at most one step: of the quantizer that made them, where the plan
                       rounds outputs (executorch, litert), else (max - min) / 255 of a batch's outputs
    largest_steps      largest difference in such steps
    integer, products  products that the runtime computes with integers, and all of them, where it says so
    accuracy           of the file on the test images, `model_accuracy` that of the fake-quantized model
    over_float         time of the same runtime's float file over that of this one, one sample at a time, one thread:
                       medians of interleaved rounds

Runtimes that are not installed are listed as missing, models that a target cannot hold as refused, with the reason.
Models are quantized on their target's own grid.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import common
from benchmarks.targets_models import CASES, Case, Data, build, float_runner
from lq_plugin.errors import ExportError, MissingPackageError
from lq_plugin.export import certify, executorch_file, export_model
from lq_plugin.export.planned import plan_for, refuse_for_target
from lq_plugin.export.target import TARGETS, Target
from lq_plugin.ptq import run_phases

ROUNDS = 15
#: Calls a round: a single short one would measure what the contender before it left in the caches.
CALLS = 32
#: Whose versions the results name.
PACKAGES = ("onnx", "onnxruntime", "openvino", "executorch", "ai-edge-litert", "litert-torch", "gguf", "transformers")
#: Samples that model and file are compared on, output by output.
COMPARED = 256


def measure(case: Case, place: str, model: nn.Module, data: Data, folder: Path) -> dict[str, Any]:
    """One row.

    Args:
        case: model and plan.
        place: the target, with the runtime after a colon where there are several.
        model: float.
        data: of the model.
        folder: for the file.
    """
    name, _, runtime = place.partition(":")
    row: dict[str, Any] = {"model": case.model, "plan": case.plan, "target": name, "runtime": runtime or None}
    if name not in TARGETS:
        return row | {"missing": f"there is no target {name}"}
    target = TARGETS[name]
    try:
        target.need_packages(name, target.runtime_of(runtime or None))
    except MissingPackageError as error:
        return row | {"missing": str(error)}
    try:
        return row | run_case(case, place, model, data, folder)
    except ExportError as error:
        return row | {"refused": str(error)[:300]}


def run_case(case: Case, place: str, model: nn.Module, data: Data, folder: Path) -> dict[str, Any]:
    """The figures of one row.

    Args:
        case, place, model, data, folder: as `measure` has them.

    Raises:
        ExportError: the target cannot hold the model.
    """
    name, _, runtime = place.partition(":")
    target = TARGETS[name]
    quantized, path = copy.deepcopy(model), folder / f"{case.model}_{case.plan}_{name}{target.suffix}".replace(" ", "_")
    plan = plan_for(case.quant_plan(name, runtime), name)
    example = data.calibration[0]
    asked = {"share_grids": target.one_grid, "round_biases": target.integer_biases}
    phases = ["fold_batch_norm", "calibrate", *(name for name, wanted in asked.items() if wanted)]
    run_phases(quantized, plan, data.calibration, phases)
    refuse_for_target(quantized, plan)
    export_model(quantized, path, (example,), data.calibration, name)
    fresh = functools.partial(copy.deepcopy, model)
    found = certify(quantized, path, data.test[:COMPARED].split(32), fresh, runtime or None, name)
    row: dict[str, Any] = {
        "runtime": found.runtime, "bytes": found.bytes, "agreement": found.verification.agreement,
        "within_one_step": found.verification.within_one_step, "largest_steps": found.verification.largest_steps,
        "versions": dict(found.versions), "processor": found.processor,
    }  # fmt: skip
    if found.products is not None:
        row |= {"integer": sum(found.products.integer.values()), "products": found.products.total}
    run = target.open(path, target.runtime_of(runtime or None), fresh).run
    if data.classes is not None:
        row["accuracy"] = _accuracy(run, data.test, data.classes)
        row["model_accuracy"] = _accuracy(quantized, data.test, data.classes)
    return row | _speed(target, runtime or None, run, model, data.test[:1])


def _accuracy(run: Callable[[Tensor], Any], inputs: Tensor, classes: Tensor) -> float:
    """Share of right predictions in percent."""
    right = 0
    with torch.no_grad():
        for x, y in zip(inputs.split(250), classes.split(250), strict=True):
            logits = run(x)
            right += int(((logits if isinstance(logits, Tensor) else logits[0]).argmax(1) == y).sum())
    return 100 * right / len(classes)


def _speed(
    target: Target, runtime: str | None, run: Callable[[Tensor], Any], model: nn.Module, x: Tensor
) -> dict[str, float]:
    """Milliseconds of the file and how many times faster than the float file it is; nothing without a float file."""
    plain = float_runner(target.name, runtime, model, x)
    if plain is None:
        return {}
    calls = {"file": lambda: [run(x) for _ in range(CALLS)], "float": lambda: [plain(x) for _ in range(CALLS)]}
    times = common.interleaved(calls, ROUNDS)
    seconds = {name: statistics.median(each) / CALLS for name, each in times.items()}
    return {"milliseconds": 1e3 * seconds["file"], "over_float": seconds["float"] / seconds["file"]}


def show(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table for a terminal."""
    columns = ("model", "plan", "target", "runtime", "bytes", "agreement", "within_one_step", "largest_steps",
               "integer", "products", "accuracy", "model_accuracy", "over_float")  # fmt: skip
    table = Table(title="files in their runtimes")
    for column in columns:
        table.add_column(column)
    for row in rows:
        if said := row.get("missing") or row.get("refused"):
            table.add_row(row["model"], row["plan"], row["target"], said)
        else:
            table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; returns the results."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=None, choices=sorted({case.model for case in CASES}))
    parser.add_argument("--targets", nargs="+", default=None, metavar="NAME", help="only these targets")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="test images (default: 10,000)")
    options: argparse.Namespace = parser.parse_args(arguments)
    common.start(options)
    logging.getLogger("lq_plugin").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if find_spec("executorch") is not None:
            executorch_file.use_threads(1)
        for case in CASES:
            if options.models is not None and case.model not in options.models:
                continue
            model, data = build(case.model, options.data, options.images)
            for place in case.targets:
                if options.targets is None or place.partition(":")[0] in options.targets:
                    rows.append(measure(case, place, model, data, Path(folder)))
                    Console().print(
                        {key: value for key, value in rows[-1].items() if key not in ("versions", "processor")}
                    )
    results = {"results": rows}
    # Thirteen columns: a narrow terminal wraps its lines.
    Console(width=max(Console().width, 180)).print(show(rows))
    common.write_json(options.json, results, PACKAGES)
    return results


if __name__ == "__main__":
    main()
