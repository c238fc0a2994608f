"""Out of training: files that are really as small as the bits say."""

from typing import Any

from lq_plugin.export.openvino import OpenVINOSession
from lq_plugin.export.packed import load_packed, save_packed
from lq_plugin.export.runtime import onnx_session
from lq_plugin.export.torchao import use_torchao
from lq_plugin.export.verify import Verification, verify
from lq_plugin.export.xnor import use_xnor, xnor_layer

__all__ = [
    "OpenVINOSession",
    "Verification",
    "export_onnx",
    "load_packed",
    "onnx_session",
    "save_packed",
    "use_torchao",
    "use_xnor",
    "verify",
    "xnor_layer",
]


def __getattr__(name: str) -> Any:
    # Packed files need no onnx.
    if name == "export_onnx":
        from lq_plugin.export_options import need_onnx

        need_onnx("export_onnx")
        from lq_plugin.export.onnx import export_onnx

        return export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
