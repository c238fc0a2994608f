"""Speed, file size and accuracy of exported models, next to the best float runtime on the machine.

    python -m benchmarks.deploy --json out.json

ResNet-20 on CIFAR-10 (`r20_b1`, `r20_b128`) and ResNet-18 at 224 pixels with random weights (`r18_b1`, `r18_b16`):
uint8 activations, weights of 8, 4 and 2 bits, batch norms folded, residual sums in 8 bits. Linear 4096 × 4096
(`linear_m1`, `linear_m32`): weights in groups of 128, ONNX Runtime with accuracy level 4 (it rounds the activations to
8 bits itself). Binary weights and inputs (`xnor_m1`, `xnor_m32`): this library's own kernel, packing included.

Linear weights are streamed from memory: each contender goes through as many copies as make up twice a cache of 32 MiB.
Binary weights take 2 MiB, more than a core's own cache and less than the shared one, and stay there, as do ONNX
Runtime's 2-bit ones next to them: one copy is called 32 times a round. `xnor_..._streamed` are the same streamed from
memory. Times are medians of interleaved rounds; float runtimes compute in float32.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import common, deploy_models
from benchmarks.ptq_accuracy import BATCH_SIZE, CALIBRATION_IMAGES, accuracy, specs
from benchmarks.resnet18 import resnet18
from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.cifar10 import load_images, normalize
from lq_plugin.demo.resnet import load_resnet
from lq_plugin.export import export_onnx, onnx_session
from lq_plugin.export.openvino import OpenVINOSession
from lq_plugin.export.xnor.layers import xnor_layer
from lq_plugin.layers import QuantizedLayer
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct

CASES = ("r20_b1", "r20_b128", "r18_b1", "r18_b16", "linear_m1", "linear_m32", "xnor_m1", "xnor_m32", "accuracy")
SETTINGS = ("float", "int8", "int4", "int2")
#: Weight specs of the settings.
CONV_SPECS = {"int8": "int8 per_channel mse", "int4": "int4 per_channel mse", "int2": "int2 per_channel mse"}
LINEAR_SPECS = {"int8": "int8 group128", "int4": "int4 group128 mse", "int2": "int2 group128 mse"}
#: Int8 activations: ONNX Runtime's kernels for 8 and 2 bits are slower than float at any other level.
ACCURACY_LEVEL = 4
WIDTH = 4096
#: Bytes of weights that one contender goes through: twice a last-level cache of 32 MiB.
STREAMED = 64 * 2**20
#: Calls a round of a weight that stays in the cache: the first one finds there what the other contenders left.
CACHED_CALLS = 32
#: Calls a round of models at batch 1.
SHORT_CALLS = {"r20": 32, "r18": 4}
Key = tuple[str, str]
Call = Callable[[], Any]


def conv_models(name: str, data: Path) -> tuple[nn.Module, list[Tensor]]:
    """The float model and calibration batches of `r20` or `r18`."""
    if name == "r18":
        return resnet18(), list(torch.randn(2, 8, 3, 224, 224, generator=torch.Generator().manual_seed(1)))
    images, _ = load_images(data, "train", 0, 256)
    return load_resnet(data / "resnet_cifar10/resnet20_jpeg.safetensors"), list(normalize(images).split(128))


def export_settings(name: str, data: Path, folder: Path) -> dict[str, Path]:
    """Files of a convolutional model for each setting."""
    model, batches = conv_models(name, data)
    files = {setting: folder / f"{name}_{setting}.onnx" for setting in SETTINGS}
    deploy_models.export_float(model, batches[0], files["float"])
    for setting, spec in CONV_SPECS.items():
        quantized = deploy_models.folded(model, batches[0])
        prepare(quantized, QuantPlan([Rule("*", weight=spec, input="uint8 affine mse")]))
        calibrate(quantized, batches)
        export_onnx(quantized, (batches[0],), files[setting], input_names=["x"], sums_from=batches)
    return files


def conv_contenders(name: str, batch: int, files: Mapping[str, Path], data: Path) -> dict[Key, tuple[Call, int]]:
    model, batches = conv_models(name, data)
    x = torch.cat(list(batches))[:batch].contiguous()

    def eager() -> Tensor:
        with torch.inference_mode():
            return model(x)

    calls: dict[Key, Call] = {("torch", "float"): eager}
    for setting, path in files.items():
        calls["onnxruntime", setting] = _runner(onnx_session(path, threads=1), x)
        if setting != "int2":  # OpenVINO has no such type
            calls["openvino", setting] = _runner(OpenVINOSession(path, threads=1, batch=batch), x)
    # A single short call would be a measure of what the contender before it left in the caches.
    count = SHORT_CALLS[name] if batch == 1 else 1
    return {key: (in_turn([call] * count), count) for key, call in calls.items()}


def _runner(session: Any, x: Tensor) -> Call:
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def in_turn(calls: Iterable[Call]) -> Call:
    """One call after the other, each once."""
    calls = list(calls)

    def run() -> None:
        for call in calls:
            call()

    return run


def copies(bits: int, streamed: bool) -> int:
    """Returns the number of copies of a weight of so many bits an element that are gone through."""
    return max(-(-STREAMED * 8 // (WIDTH * WIDTH * bits)), 2) if streamed or bits > 2 else 1


def linear_contenders(
    rows: int, folder: Path, settings: Sequence[str] = SETTINGS, streamed: bool = True
) -> tuple[dict[Key, tuple[Call, int]], dict[str, float]]:
    """Linear layers by runtime and setting: a call that goes through all copies, and their number; output errors."""
    torch.manual_seed(0)
    x = torch.randn(rows, WIDTH)
    calls: dict[Key, tuple[Call, int]] = {("torch", "float"): _torch_linear(x)}
    errors = {}
    for setting in settings:
        path = folder / f"linear_{setting}.onnx"
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(linear.weight, std=WIDTH**-0.5)
        layer = nn.Sequential(linear)
        if setting == "float":
            deploy_models.export_float(layer, torch.randn(2, WIDTH), path)
            kinds: dict[str, Call] = {"openvino": functools.partial(OpenVINOSession, path, threads=1, batch=rows)}
        else:
            prepare(layer, QuantPlan([Rule("*", weight=LINEAR_SPECS[setting])]))
            calibrate(layer, [torch.randn(2, WIDTH)])
            export_onnx(layer, (torch.randn(2, WIDTH),), path, input_names=["x"])
            kinds = {}
        kinds["onnxruntime"] = functools.partial(onnx_session, path, ACCURACY_LEVEL, threads=1)
        count = copies(32 if setting == "float" else int(setting[3:]), streamed)
        for runtime, make in kinds.items():
            sessions = [make() for _ in range(count)]
            calls[runtime, setting] = (
                in_turn(_runner(session, x) for session in sessions * _rounds(count)),
                count * _rounds(count),
            )
        with torch.inference_mode():
            want = layer(x).numpy()
        got = sessions[0].run(None, {"x": x.numpy()})[0]
        errors[setting] = float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))
    return calls, errors


def _rounds(count: int) -> int:
    """Returns the number of times that the copies are gone through in a round."""
    return CACHED_CALLS if count == 1 else 1


def _torch_linear(x: Tensor) -> tuple[Call, int]:
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(copies(32, True))]

    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer(x)

    return run, len(layers)


def xnor_contenders(rows: int, folder: Path, streamed: bool) -> dict[Key, tuple[Call, int]]:
    """Binary × binary by this library's kernel, and what it is compared with."""
    calls, _ = linear_contenders(rows, folder, ("float", "int2"), streamed)
    x = torch.randn(rows, WIDTH)
    count = copies(1, streamed)
    layers = []
    for _ in range(count):
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        layer = nn.Sequential(linear)
        prepare(layer, QuantPlan([Rule("*", weight="sign", input="sign")]))
        layers.append(xnor_layer(cast(QuantizedLayer, linear.eval()), native=True))
    with torch.inference_mode():
        assert torch.equal(layers[-1](x), layer(x)), "the kernel and the quantized layer differ"

    def run() -> None:
        with torch.inference_mode():
            for layer in layers * _rounds(count):
                layer(x)

    calls["lq", "binary"] = run, count * _rounds(count)
    return calls


def measure(case: str, calls: Mapping[Key, tuple[Call, int]], rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: milliseconds, and how many times faster than eager and than the best float runtime."""
    names = {" ".join(key): key for key in calls}
    times = common.interleaved({name: calls[key][0] for name, key in names.items()}, rounds, warm_up=2)
    medians = {key: statistics.median(times[name]) / calls[key][1] * 1e3 for name, key in names.items()}
    best = min(value for (runtime, setting), value in medians.items() if setting == "float" and runtime != "torch")
    return [
        {
            "case": case,
            "runtime": runtime,
            "setting": setting,
            "milliseconds": value,
            "over_eager": medians["torch", "float"] / value,
            "over_best_float": best / value,
            "calls_a_round": calls[runtime, setting][1],
        }
        for (runtime, setting), value in medians.items()
    ]


def measure_accuracy(data: Path, folder: Path, iterations: int) -> dict[str, Any]:
    """W8A8 and W4A8 with AdaRound on ResNet-20, all test images: fake-quantized, and the exported file on both
    runtimes."""
    model = load_resnet(data / "resnet_cifar10/resnet20_jpeg.safetensors")
    images, _ = load_images(data, "train", 0, CALIBRATION_IMAGES)
    batches = list(normalize(images).split(BATCH_SIZE))
    images, labels = load_images(data, "test")
    test = normalize(images)
    result: dict[str, Any] = {
        "float": accuracy(model, test, labels),
        "test_images": len(labels),
        "adaround_iterations": iterations,
    }
    for bits in ("W8A8", "W4A8"):
        weight, inputs = specs(bits, "mse")
        quantized = deploy_models.folded(model, batches[0])
        prepare(quantized, QuantPlan([Rule("*", weight=weight, input=inputs)]))
        calibrate(quantized, batches)
        reconstruct(quantized, batches, by="layer", iterations=iterations, seed=0)
        quantized.eval()
        row: dict[str, Any] = {"fake_quantized": accuracy(quantized, test, labels)}
        with torch.inference_mode():
            ours = torch.cat([quantized(x).argmax(1) for x in test.split(250)])
        for form, sums in (("", batches), ("_plan_only", None)):
            path = folder / f"accuracy_{bits}{form}.onnx"
            row[f"bytes{form}"] = export_onnx(quantized, (batches[0],), path, input_names=["x"], sums_from=sums)
            sessions = {
                "onnxruntime": onnx_session(path, threads=1),
                "openvino": OpenVINOSession(path, threads=1, batch=250),
            }
            for runtime, session in sessions.items():
                found = torch.cat(
                    [torch.from_numpy(session.run(None, {"x": x.numpy()})[0]).argmax(1) for x in test.split(250)]
                )
                row[f"{runtime}{form}"] = 100.0 * int((found == labels).sum()) / len(labels)
                row[f"{runtime}{form}_agreement"] = 100.0 * int((found == ours).sum()) / len(labels)
        result[bits] = row
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds that count (default: 9)")
    parser.add_argument(
        "--iterations", type=int, default=1000, metavar="N", help="of AdaRound, for accuracy (default: 1000)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    console = Console()
    results: dict[str, Any] = {
        "results": [],
        "file_ratio": {},
        "linear_output_error": {},
        "accuracy_level": ACCURACY_LEVEL,
        "accuracy": {},
    }

    def add(rows: list[dict[str, Any]]) -> None:
        results["results"] += rows
        common.write_json(options.json, results, ("onnx", "onnxruntime", "openvino"))
        console.print(table(rows))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, cases in itertools.groupby(
            (case for case in options.cases if case.startswith("r")), lambda case: case[:3]
        ):
            files = export_settings(model, options.data, folder)
            size = {setting: path.stat().st_size for setting, path in files.items()}
            results["file_ratio"][model] = {setting: size["float"] / size[setting] for setting in SETTINGS[1:]}
            for case in cases:
                contenders = conv_contenders(model, int(case.partition("_b")[2]), files, options.data)
                add(measure(case, contenders, options.rounds))
        for case in (case for case in options.cases if "_m" in case):
            kind, rows = case.partition("_m")[0], int(case.partition("_m")[2])
            if kind == "linear":
                counted, results["linear_output_error"][case] = linear_contenders(rows, folder)
                add(measure(case, counted, options.rounds))
            else:
                add(measure(case, xnor_contenders(rows, folder, False), options.rounds))
                add(measure(f"{case}_streamed", xnor_contenders(rows, folder, True), options.rounds))
        if "accuracy" in options.cases:
            results["accuracy"] = measure_accuracy(options.data, folder, options.iterations)
            console.print(results["accuracy"])
    console.print(results["file_ratio"])
    common.write_json(options.json, results, ("onnx", "onnxruntime", "openvino"))
    return results


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table("case", "runtime", "setting", "ms", "× eager", "× best float")
    for row in rows:
        numbers = (f"{row['milliseconds']:.3f}", f"{row['over_eager']:.2f}", f"{row['over_best_float']:.2f}")
        result.add_row(row["case"], row["runtime"], row["setting"], *numbers)
    return result


if __name__ == "__main__":
    main()
