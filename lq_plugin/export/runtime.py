"""Run an exported file with ONNX Runtime. Another runtime: `lq_plugin.export.openvino`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lq_plugin.errors import ExportError


def onnx_session(path: str | Path | bytes, accuracy_level: int = 1, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU that computes what the file says.

    ONNX Runtime turns a DequantizeLinear before a MatMul into one operation and, left to itself, rounds the float
    activations of it to 8 bits, although the file does not ask for it. The accuracy level decides.

    Args:
        path: of the ONNX file, or its content.
        accuracy_level: 1 float32, 2 float16, 3 bfloat16, 4 int8 activations (ONNX Runtime's own choice, the fastest).
        threads: within an operation; None: all.

    Raises:
        ExportError: when there is no such file.
        ImportError: without onnxruntime (`pip install "lq_plugin[onnx]"`).
    """
    import onnxruntime  # type: ignore[import-untyped]

    if not isinstance(path, bytes) and not Path(path).is_file():
        raise ExportError(f"cannot open {path}: no such file")
    if accuracy_level not in (1, 2, 3, 4):
        raise ExportError(f"accuracy_level is 1 (float32), 2 (float16), 3 (bfloat16) or 4 (int8), got {accuracy_level!r}")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path if isinstance(path, bytes) else str(path), options, providers=["CPUExecutionProvider"])
