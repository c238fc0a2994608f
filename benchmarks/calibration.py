"""Cost of calibration: every range estimator in plain forward passes of the float model, next to other libraries.

    python -m benchmarks.calibration --json out.json

Every layer is quantized: weights int4 per channel, inputs uint4 per tensor. `collect` is the one pass that serves all
estimators; a row of an estimator is that pass and its ranges for all weights and inputs; `all` is one pass and the
ranges of all seven. Peers find the ranges of the same float model over the same batches, by their own defaults:
torchao's pt2e with the observers of its X86 quantizer (histograms of activations, min-max of weights), ONNX Runtime's
calibrators (of activations; Entropy and Percentile keep a batch's activations at once); Brevitas and AIMET, where they
are installed (`python -m benchmarks.peers install brevitas aimet`), in processes of their own environments that take
their turns. Each ratio is that of medians of interleaved runs to torch's forward pass, one thread.

`growth` has seconds over a size that doubles: batches, channels of a weight, elements of a tensor, histogram bins; and
the bytes of an activation's statistics after a stream of a million rows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import common
from benchmarks.calibration_models import MODELS, load
from benchmarks.deploy_models import export_float
from benchmarks.peers import PeerError
from benchmarks.peers.calibrating import PeerCalibration
from benchmarks.ptq_accuracy import all_estimates, forward_pass
from lq_plugin import QuantPlan, Rule, prepare
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.model.calibrate import collect_statistics
from lq_plugin.ranges import Histogram, Sample, estimate_range
from lq_plugin.ranges.laboratory import COMPARED

PEERS = ("torchao", "onnxruntime", "brevitas", "aimet")
CALIBRATORS = ("MinMax", "Entropy", "Percentile")
Call = Callable[[], Any]


def ours(model: nn.Module, batches: list[Tensor]) -> dict[str, Call]:
    """The pass that collects, and each estimator with it."""
    prepared = copy.deepcopy(model)
    prepare(prepared, QuantPlan([Rule("*", weight="int4 per_channel", input="uint4 affine")]))
    calls: dict[str, Call] = {"lq collect": partial(collect_statistics, prepared, batches)}
    calls |= {f"lq {name}": partial(all_estimates, prepared, batches, (name,)) for name in COMPARED}
    return calls | {"lq all": partial(all_estimates, prepared, batches)}


def torchao(model: nn.Module, batches: list[Tensor]) -> dict[str, Call]:
    """Observers of pt2e for the X86 backend; exported and prepared beforehand, which is not timed."""
    # Importing it warns of torch's own deprecations.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e.observer import ObserverBase
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        exported = torch.export.export(model, (batches[0],), strict=True).module()
        prepared = prepare_pt2e(exported, quantizer)

    def run() -> None:
        # Observers go on from where they stand: each run gets fresh ones.
        fresh = copy.deepcopy(prepared)
        forward_pass(fresh, batches)
        for observer in fresh.modules():
            if isinstance(observer, ObserverBase):
                observer.calculate_qparams()

    return {"torchao pt2e": run}


class _Reader:
    """One batch, as ONNX Runtime's calibrators read them."""

    def __init__(self, batch: Tensor) -> None:
        self.inputs: list[dict[str, Any]] = [{"x": batch.numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        return self.inputs.pop() if self.inputs else None


def onnx_runtime(model: nn.Module, batches: list[Tensor], folder: Path) -> dict[str, Call]:
    """ONNX Runtime's calibrators, one thread. Augmenting the model is not timed."""
    import onnxruntime
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    onnxruntime.set_default_logger_severity(3)
    path = folder / "float.onnx"
    export_float(model, batches[0], path)

    def run(method: str) -> None:
        calibrator = calibrators[method]
        calibrator.clear_collected_data()
        if method != "MinMax":
            calibrator.collector = None
        # It prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            for batch in batches:
                calibrator.collect_data(_Reader(batch))
            calibrator.compute_data()

    calibrators = {}
    for method in CALIBRATORS:
        options = {"symmetric": False}
        made = create_calibrator(
            path,
            augmented_model_path=str(folder / f"{method}.onnx"),
            calibrate_method=CalibrationMethod[method],
            extra_options=options,
        )
        one = onnxruntime.SessionOptions()
        one.intra_op_num_threads = torch.get_num_threads()
        made.infer_session = onnxruntime.InferenceSession(
            str(folder / f"{method}.onnx"), one, providers=["CPUExecutionProvider"]
        )
        calibrators[method] = made
    return {f"onnxruntime {method}": partial(run, method) for method in CALIBRATORS}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and ratios of one model."""
    model, batches = load(name, options.data, options.batches)
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        calls: dict[str, Call] = {"forward_pass": partial(forward_pass, model, batches), **ours(model, batches)}
        for peer in options.peers:
            if peer == "torchao":
                calls |= torchao(model, batches)
            elif peer == "onnxruntime":
                calls |= onnx_runtime(model, batches, Path(folder))
            else:
                try:
                    process = PeerCalibration(peer, name, options.data, options.batches, torch.get_num_threads())
                except PeerError as error:
                    missing[peer] = str(error).splitlines()[-1]
                    continue
                stack.callback(process.close)
                calls |= process.calls()
        times = common.interleaved(calls, rounds=options.rounds)
    return {
        "model": name,
        "batches": len(batches),
        "forward_pass_seconds": statistics.median(times["forward_pass"]),
        "over_forward_pass": {key: common.ratio(times, key, "forward_pass") for key in times if key != "forward_pass"},
        "missing": missing,
    }


def doubling(make: Callable[[int], Call], sizes: list[int], rounds: int) -> list[list[float]]:
    """`[size, median seconds]` of calls that are made for each size."""
    times = common.interleaved({str(size): make(size) for size in sizes}, rounds)
    return [[size, statistics.median(times[str(size)])] for size in sizes]


def growth(rounds: int) -> dict[str, Any]:
    """Returns seconds and memory as the data grows, estimator by estimator where it has a part in it."""
    torch.manual_seed(0)
    grid, net = IntegerGrid(-8, 7), nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel", input="uint4 affine")]))
    batch = torch.randn(1024, 256)
    weights = torch.randn(2**12, 576)
    values = torch.randn(2**24)

    def estimator(name: str, sample: Callable[[int], Sample]) -> list[list[float]]:
        return doubling(
            lambda rows: partial(estimate_range, name, sample(rows), grid), [2**8, 2**9, 2**10, 2**11, 2**12], rounds
        )

    def binned(bins: int) -> Call:
        histogram = Histogram(bins=bins)
        histogram.update(values[: 2**20])
        sample = histogram.sample()
        return lambda: [estimate_range(name, sample, grid) for name in COMPARED]

    def stream(rows: int) -> dict[str, int]:
        histogram = Histogram()
        for _ in range(rows // 1000):
            histogram.update(torch.randn(1000, 64))
        return {"rows": rows, "bytes": sum(state.nbytes for state in histogram.state_dict().values())}

    return {
        "batches": doubling(lambda count: partial(collect_statistics, net, [batch] * count), [8, 16, 32, 64], rounds),
        "channels": {name: estimator(name, lambda rows: Sample.from_tensor(weights[:rows])) for name in COMPARED},
        "elements": doubling(
            lambda count: partial(Histogram().update, values[:count]), [2**20, 2**21, 2**22, 2**23, 2**24], rounds
        ),
        "bins": doubling(binned, [1024, 2048, 4096, 8192], rounds),
        "stream": [stream(rows) for rows in (10_000, 100_000, 1_000_000)],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="to measure (default: all)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="next to ours (default: all)")
    parser.add_argument("--batches", type=int, default=8, metavar="N", help="of calibration data (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="that are timed (default: 5)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    results: dict[str, Any] = {"estimators": list(COMPARED), "results": []}
    console, packages = Console(), ("torchao", "onnxruntime")
    for name in options.models:
        results["results"].append(measure(name, options))
        common.write_json(options.json, results, packages)
        console.print(table(results["results"][-1]))
    results["growth"] = growth(options.rounds)
    common.write_json(options.json, results, packages)
    console.print(results["growth"], highlight=False)
    return results


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        "",
        "forward passes",
        "low",
        "high",
        title=f"{result['model']}: one pass takes {result['forward_pass_seconds']:.2f} s",
    )
    for name, ratio in result["over_forward_pass"].items():
        shown.add_row(name, *(f"{ratio[key]:.2f}" for key in ("ratio", "low", "high")))
    for peer, reason in result["missing"].items():
        shown.add_row(peer, reason)
    return shown


if __name__ == "__main__":
    main()
