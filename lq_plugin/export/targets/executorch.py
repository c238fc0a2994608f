"""Target `executorch`: a `.pte` program that computes with XNNPACK's integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.export.integer_program.options import BATCH, TAKES
from lq_plugin.export.request import Request
from lq_plugin.export.target import Products, Reader, Target, register_target
from lq_plugin.intent.spec import QuantSpec


@register_target
class ExecuTorch(Target):
    """ExecuTorch programs; see `lq_plugin.export.executorch_file`."""

    name, suffix = "executorch", ".pte"
    summary = "ExecuTorch program for phones and small boards: integer convolutions, products and sums by XNNPACK"
    packages = runtimes = ("executorch",)
    options = (BATCH,)
    needs_inputs = integer_biases = True
    takes: ClassVar = TAKES

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.integer_program.faults import model_faults

        return super().model_faults(request) + model_faults(request, "XNNPACK")

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.integer_program.faults import spec_fault

        return spec_fault(slot, spec, layer, "XNNPACK")

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        # Symmetric weights of a byte have no -128.
        byte = slot == "weight" and spec.is_uniform and spec.bit_width == 8 and spec.signed and not spec.affine
        return spec.replace(narrow_range=True) if byte else spec

    def products(self, path: Path, runtime: str | None) -> Products:
        from lq_plugin.export.executorch_products import executorch_products

        return executorch_products(path)

    def needs_batches(self, options: Mapping[str, Any]) -> bool:
        return True

    def write(self, request: Request) -> int:
        from lq_plugin.export.executorch_file import export_executorch

        assert request.path is not None
        assert request.inputs is not None
        batch = self.settings(request)["batch"]
        return export_executorch(request.model, request.inputs, request.path, request.batches, batch)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.executorch_file import open_executorch

        return open_executorch(path)
