"""Target `openvino`: OpenVINO's own files, which have integers of 2 and 3 bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.onnx_file.options import PACKAGES
from lq_plugin.export.request import Option, Request, flag_fault
from lq_plugin.export.target import register_target
from lq_plugin.export.targets.onnx import ONNX


@register_target
class OpenVINO(ONNX):
    """Files of two parts, `.xml` and `.bin`; see `lq_plugin.export.openvino_file`."""

    name, suffix = "openvino", ".xml"
    summary = "OpenVINO's own files (.xml and .bin): integers of 2 to 8 bits and FP4, integer kernels also below 8 bits"
    packages, runtimes = (*PACKAGES, "openvino"), ("openvino",)
    options = (
        *(option for option in ONNX.options if option.name in ("dynamic_dims", "round_sums", "signed")),
        Option("three_bits", False, flag_fault("three_bits")),
    )

    def form(self, settings: Mapping[str, Any]) -> Form:
        # As its reader of ONNX has them; `write` makes smaller ones of them afterwards.
        # FP8 activations would be rounded by way of float16.
        return Form(smallest=4, smallest_whole=4, fp4="float4", signed=settings["signed"], float_activations=False)

    def write(self, request: Request) -> int:
        from lq_plugin.export.openvino_file import write_ir
        from lq_plugin.utilities.files import temporary_folder

        assert request.path is not None
        with temporary_folder("openvino") as folder:
            graph = Path(folder, "model.onnx")
            self.write_graph(request, graph)
            return write_ir(graph, request.path, self.settings(request)["three_bits"])

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]
