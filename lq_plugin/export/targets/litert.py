"""Target `litert`: a `.tflite` file that computes with integers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.export.integer_program.options import BATCH, TAKES
from lq_plugin.export.request import Request
from lq_plugin.export.target import Products, Reader, Target, register_target
from lq_plugin.intent.spec import QuantSpec


@register_target
class LiteRT(Target):
    """TensorFlow Lite files; see `lq_plugin.export.litert_file`."""

    name, suffix = "litert", ".tflite"
    summary = "TensorFlow Lite file of integers alone, for phones and microcontrollers (LiteRT)"
    packages, runtimes = ("ai_edge_litert", "litert_torch"), ("ai_edge_litert",)
    options = (BATCH,)
    needs_inputs = integer_biases = True
    takes: ClassVar = TAKES

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.integer_program.faults import model_faults

        return super().model_faults(request) + model_faults(request, "LiteRT")

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.integer_program.faults import spec_fault

        return spec_fault(slot, spec, layer, "LiteRT")

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        # Symmetric weights of a byte have no -128.
        byte = slot == "weight" and spec.is_uniform and spec.bit_width == 8 and spec.signed and not spec.affine
        return spec.replace(narrow_range=True) if byte else spec

    def products(self, path: Path, runtime: str | None) -> Products:
        from lq_plugin.export.litert_file import litert_products

        return litert_products(path)

    def needs_batches(self, options: Mapping[str, Any]) -> bool:
        return True

    def write(self, request: Request) -> int:
        from lq_plugin.export.litert_file import export_litert

        assert request.path is not None
        assert request.inputs is not None
        batch = self.settings(request)["batch"]
        return export_litert(request.model, request.inputs, request.path, request.batches, batch)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.litert_file import open_litert

        return open_litert(path)
