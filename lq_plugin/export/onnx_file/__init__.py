"""ONNX files in the QDQ form, which ONNX Runtime and OpenVINO read."""

from typing import Any

from lq_plugin.export.onnx_file.options import PACKAGES
from lq_plugin.extras import need_packages


def __getattr__(name: str) -> Any:
    if name == "export_onnx":
        need_packages("export_onnx", *PACKAGES)
        from lq_plugin.export.onnx_file.write import export_onnx

        return export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
