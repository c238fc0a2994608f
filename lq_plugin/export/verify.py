"""Run an exported file beside the model it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import ExportError, did_you_mean
from lq_plugin.export.openvino import OpenVINOSession
from lq_plugin.export.packed import load_packed
from lq_plugin.export.runtime import onnx_session


@dataclass(frozen=True)
class Verification:
    """How a file's answers compare with the model's.

    Args:
        samples: compared.
        bit_equal: every number is the same.
        agreement: share of samples whose largest logit is the same one, 0..1.
        largest_difference: of any output, relative to the largest output.
    """

    samples: int
    bit_equal: bool
    agreement: float
    largest_difference: float


#: What opens an ONNX file, by name.
RUNTIMES: dict[str, Callable[[Path], Any]] = {"onnxruntime": onnx_session, "openvino": OpenVINOSession}


def verify(
    model: nn.Module,
    path: str | Path,
    inputs: Iterable[Tensor],
    fresh: Callable[[], nn.Module] | None = None,
    runtime: str = "onnxruntime",
) -> Verification:
    """Compare an exported file with the fake-quantized model on some inputs.

    Args:
        model: the one that was exported; logits `[N, ..., classes]` of one tensor.
        path: `.onnx` or packed.
        inputs: batches.
        fresh: makes a float model for a packed file to be read into.
        runtime: of an ONNX file: "onnxruntime" or "openvino".

    Raises:
        ExportError: no inputs, an unknown runtime, or no way to read the file.
    """
    path = Path(path)
    if runtime not in RUNTIMES:
        raise ExportError(f"runtime is {' or '.join(RUNTIMES)}, got {runtime!r}.{did_you_mean(str(runtime), RUNTIMES)}")
    run: Callable[[Tensor], Tensor]
    if path.suffix == ".onnx":
        session = RUNTIMES[runtime](path)
        name = session.get_inputs()[0].name

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    elif fresh is None:
        raise ExportError(f"{path} is read into a float model: give verify(..., fresh=lambda: MyModule())")
    else:
        other = fresh()
        load_packed(other, path)
        run = other
    samples = agreed = 0
    largest = difference = 0.0
    equal = True
    model.eval()
    with torch.no_grad():
        for x in inputs:
            mine, theirs = model(x), run(x)
            equal &= torch.equal(mine, theirs)
            largest = max(largest, float(mine.abs().max()))
            difference = max(difference, float((mine - theirs).abs().max()))
            agreed += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
            samples += mine[..., 0].numel()
    if not samples:
        raise ExportError("nothing to verify with: there were no inputs")
    return Verification(samples, equal, agreed / samples, difference / largest if largest else difference)


def inputs_of(batches: Iterable[Any], count: int) -> list[Tensor]:
    """The input tensor of up to `count` batches: the batch itself, or its first element.

    Raises:
        ExportError: when a batch is neither.
    """
    found: list[Tensor] = []
    for batch in batches:
        if len(found) == count:
            break
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise ExportError(
                f"a batch is a tensor or starts with one, got {type(batch).__name__}; call lq_plugin.export from Python for others"
            )
        found.append(x)
    return found
