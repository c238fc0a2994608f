"""ONNX Runtime as a runtime of exported files; `lq_plugin.export.openvino` is another."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lq_plugin.errors import ExportError
from lq_plugin.extras import need_packages
from lq_plugin.layers.integer.kernels import LARGEST_EXACT


def onnx_session(
    path: str | Path | bytes, accuracy_level: int = 1, threads: int | None = None, optimized: Path | None = None
) -> Any:
    """Returns an `onnxruntime.InferenceSession` on the CPU that computes what the file says.

    ONNX Runtime fuses a DequantizeLinear with the MatMul that reads it and, by default, rounds that operation's float
    activations to 8 bits, although the file does not ask for it. The accuracy level decides.

    Its pass `WeightBiasQuantization` quantizes biases (which may not fit into int32) and weights that a file leaves
    float next to quantized activations. The pass is off here. Files of `export_onnx` compute the same in any session.

    On x86 processors without VNNI instructions its kernels for int8 weights saturate sums of two products in 16 bits,
    so that large weights times large inputs are wrong. There, weights of more than 7 bits are passed to it as uint8,
    whose kernels are exact.

    Args:
        path: of the ONNX file, or its content.
        accuracy_level: 1 float32, 2 float16, 3 bfloat16, 4 int8 activations (ONNX Runtime's own choice, the fastest).
        threads: within an operation; None: all.
        optimized: where ONNX Runtime writes the graph that it runs; None: nowhere.

    Raises:
        ExportError: when there is no such file, or ONNX Runtime cannot read it.
        MissingPackageError: without onnxruntime and onnx (`pip install "lq_plugin[onnx]"`).
    """
    # Where the processor saturates, the file is read and changed.
    need_packages("onnx_session", "onnxruntime", "onnx")
    import onnxruntime  # type: ignore[import-untyped]

    if not isinstance(path, bytes) and not Path(path).is_file():
        raise ExportError(f"cannot open {path}: no such file")
    if accuracy_level not in (1, 2, 3, 4):
        raise ExportError(
            f"accuracy_level is 1 (float32), 2 (float16), 3 (bfloat16) or 4 (int8), got {accuracy_level!r}"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each constant that it cannot compute in advance
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    content = path if isinstance(path, bytes) else str(path)
    where = "the model" if isinstance(path, bytes) else str(path)
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_from_string(content) if isinstance(content, bytes) else onnx.load(content)
    except DecodeError as error:
        raise ExportError(f"{where} is no ONNX file, or a damaged one: {error}") from error
    if saturates() and _weights_as_unsigned(model):
        content = model.SerializeToString()
    disabled = ["WeightBiasQuantization"]
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except _refusals() as error:
        fp4 = any(tensor.data_type == onnx.TensorProto.FLOAT4E2M1 for tensor in model.graph.initializer)
        advice = "it has no kernels for FLOAT4E2M1: export with fp4=uint4 or fp4=int8; " if fp4 else ""
        raise ExportError(f"ONNX Runtime cannot read {where}: {advice}{str(error)[:500]}") from error


def _refusals() -> tuple[type[Exception], ...]:
    """Returns the exceptions that ONNX Runtime raises for a file; their only common class is Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped]

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.RuntimeException,
    )


@functools.cache
def saturates() -> bool:
    """Returns True where ONNX Runtime's sums of products of 8 bits are wrong on this processor; tried once."""
    import onnxruntime
    from onnx import TensorProto, helper

    values = [
        helper.make_tensor_value_info(name, kind, [64, 64])
        for name, kind in zip("xwy", (TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32), strict=True)
    ]
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "product", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, w = np.full((64, 64), 255, np.uint8), np.full((64, 64), 127, np.int8)
    return bool((session.run(None, {"x": x, "w": w})[0] != 255 * 127 * 64).any())


def _weights_as_unsigned(model: Any) -> bool:
    """Moves int8 weights whose products can saturate, and their zero points, to uint8 in place; returns True if any."""
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    moved: set[str] = set()

    def move(name: str) -> None:
        if name not in moved:
            values = numpy_helper.to_array(constants[name]).astype(np.int16)
            constants[name].CopyFrom(numpy_helper.from_array((values + 128).astype(np.uint8), name))
            moved.add(name)

    for node in model.graph.node:
        codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        blocks = any(attribute.name == "block_size" and attribute.i for attribute in node.attribute)
        if codes is None or blocks or len(codes.dims) < 2:
            continue
        if codes.name not in moved and (
            codes.data_type != TensorProto.INT8 or not exceeds_16_bits(numpy_helper.to_array(codes))
        ):
            continue
        move(codes.name)
        if len(node.input) == 3:
            move(node.input[2])
        else:
            zeros = numpy_helper.from_array(
                np.full(constants[node.input[1]].dims, 128, np.uint8), f"{node.output[0]}.zero_point"
            )
            model.graph.initializer.append(zeros)
            node.input.append(zeros.name)
    return bool(moved)


def exceeds_16_bits(weight: NDArray[np.integer[Any]]) -> bool:
    """Returns True where the sum of two products of a byte and such integers can leave 16 bits."""
    return int(np.abs(weight.astype(np.int16)).max(initial=0)) > LARGEST_EXACT
