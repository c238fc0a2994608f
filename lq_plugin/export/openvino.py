"""OpenVINO as a runtime of exported ONNX files, and of its own ones, on the CPU."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.runtime import exceeds_16_bits
from lq_plugin.extras import need_packages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """Input of a graph."""

    name: str


class OpenVINOSession:
    """An ONNX file, or one of OpenVINO's own, compiled by OpenVINO, called like an `onnxruntime.InferenceSession`.

    It computes what the file says. By default OpenVINO rounds float layers to bfloat16 where the processor has it, and
    activations of layers with integer weights to 8 bits. On processors without VNNI instructions its integer kernels
    saturate where weights have more than 7 bits; float kernels compute such files there, which a log says.

    Args:
        path: of the `.onnx` or `.xml` file.
        threads: within an operation; None: OpenVINO's choice.
        batch: size of dim 0 of every input; a fixed one makes calls faster. None: as the file says.

    Raises:
        ExportError: no such file, or one that OpenVINO cannot read: it has no INT2 (export with `smallest=4`), and no
            groups that do not divide their axis.
        MissingPackageError: without openvino (`pip install "lq_plugin[openvino]"`).
    """

    def __init__(self, path: str | Path, threads: int | None = None, batch: int | None = None) -> None:
        need_packages("OpenVINOSession", "openvino")
        import openvino  # type: ignore[import-untyped]

        if not Path(path).is_file():
            raise ExportError(f"cannot open {path}: no such file")
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # A pinned thread waits for its core while another one is idle.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            model = core.read_model(str(path))
            if batch is not None:
                model.reshape({value: [batch, *list(value.partial_shape)[1:]] for value in model.inputs})
            if _has_wide_weights(model) and saturates():
                _say_once()
                options["LP_TRANSFORMS_MODE"] = False
            self.compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot read {path}: {_why(Path(path), error)}") from error
        self.request = self.compiled.create_infer_request()
        self.names = [value.any_name for value in model.inputs]
        self._dtypes = [value.get_element_type().to_dtype() for value in model.inputs]
        self._tensor = functools.partial(openvino.Tensor, shared_memory=True)
        self.outputs = [value.any_name for value in model.outputs]

    def get_inputs(self) -> list[Input]:
        """Returns the graph's inputs in their order."""
        return [Input(name) for name in self.names]

    def run(self, output_names: Sequence[str] | None, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Returns the named outputs of the graph, or all of them.

        Raises:
            ExportError: names that the graph does not have, inputs that are missing, shapes that it does not take.
        """
        faults = [f"there is no input {name!r}" for name in inputs if name not in self.names]
        faults += [f"the input {name!r} is missing" for name in self.names if name not in inputs]
        faults += [f"there is no output {name!r}" for name in output_names or () if name not in self.outputs]
        raise_all(
            ExportError, f"the graph has inputs {', '.join(self.names)} and outputs {', '.join(self.outputs)}", faults
        )
        # As `infer(inputs)`, which takes 60 us longer, a seventh of a small network's time. Tensors hold no reference.
        arrays = [
            np.require(inputs[name], dtype, ["C", "W"]) for name, dtype in zip(self.names, self._dtypes, strict=True)
        ]
        try:
            for index, array in enumerate(arrays):
                self.request.set_input_tensor(index, self._tensor(array))
        except RuntimeError as error:
            graph = ", ".join(f"{value.any_name}: {value.partial_shape}" for value in self.compiled.inputs)
            got = ", ".join(f"{name}: {list(array.shape)}" for name, array in zip(self.names, arrays, strict=True))
            raise ExportError(f"the graph takes {graph}; got {got}") from error
        self.request.infer(share_outputs=True)
        results = [self.request.get_output_tensor(index).data.copy() for index in range(len(self.outputs))]
        return results if not output_names else [results[self.outputs.index(name)] for name in output_names]


def _why(path: Path, error: Exception) -> str:
    """Returns OpenVINO's message without places in its source, after the reasons known for this file."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = "; ".join(
        line for line in lines if line and not line.startswith("Exception from") and not line.endswith(":")
    )
    return "; ".join([*_unreadable(path), (said or str(error))[:500]])


def _unreadable(path: Path) -> list[str]:
    """Returns the known reasons why OpenVINO cannot read a file; none without the package onnx."""
    if path.suffix == ".xml":
        return [] if path.with_suffix(".bin").is_file() else [f"{path.with_suffix('.bin').name} is missing next to it"]
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError:
        return []
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        return ["it is no ONNX file, or a damaged one"]
    int2 = {getattr(onnx.TensorProto, name, None) for name in ("INT2", "UINT2")}
    found = ["it has no INT2: export with smallest=4"] if any(t.data_type in int2 for t in graph.initializer) else []
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    for node in graph.node:
        options = {a.name: a.i for a in node.attribute} if node.op_type == "DequantizeLinear" else {}
        shape = shapes.get(node.input[0], []) if options.get("block_size") else []
        if shape and shape[options.get("axis", 1)] % options["block_size"]:
            size = options["block_size"]
            found.append(
                f"it cannot read groups that do not divide their axis ({node.input[0]}: {shape}, groups of {size}); "
                "choose a size that does"
            )
            break
    return found


def _has_wide_weights(model: Any) -> bool:
    """Returns True where integer kernels may make sums with these weights that leave 16 bits."""
    # Unsigned integers become signed before they are multiplied.
    shift = {"i8": 0, "u8": 128}
    for operation in model.get_ops():
        kind = operation.get_element_type().get_type_name() if operation.get_type_name() == "Constant" else ""
        if (
            kind in shift
            and len(operation.shape) > 1
            and exceeds_16_bits(operation.get_data().astype(np.int16) - shift[kind])
        ):
            return True
    return False


@functools.cache
def _say_once() -> None:
    log.warning(
        "OpenVINO's integer kernels saturate on this processor (no VNNI) where weights take 8 bits: float kernels "
        "compute such files. "
        "Weights of 7 bits (int7) would be exact and fast there; ONNX Runtime is exact with 8"
    )


@functools.cache
def saturates() -> bool:
    """Returns True where OpenVINO's sums of products of 8 bits are wrong on this processor; tried once."""
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([1, 64], np.float32)
    low, high = np.float32(0), np.float32(255)
    weight = ops.multiply(
        ops.convert(ops.constant(np.full((16, 64), 127, np.int8)), np.float32), ops.constant(np.float32(1))
    )
    product = ops.matmul(ops.fake_quantize(x, low, high, low, high, 256), weight, False, True)
    compiled = openvino.Core().compile_model(openvino.Model([product], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return bool((compiled(np.full((1, 64), 255, np.float32))[0] != 255 * 127 * 64).any())
