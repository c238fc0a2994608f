"""Target `executorch`: a `.pte` program that computes with XNNPACK's integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.export.integer_program.options import TAKES
from lq_plugin.export.integer_program.target import IntegerProgramTarget
from lq_plugin.export.integer_program.timing import ProgramTiming
from lq_plugin.export.request import Request
from lq_plugin.export.target import Products, Reader, register_target
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import PerToken, QuantSpec


class _Timing(ProgramTiming):
    suffix = ".pte"

    def smallest_of(self, plan: LayerPlan) -> int:
        # Next to tokens, weights of up to 4 bits are half a byte.
        return 4 if plan.input is not None and plan.input.dynamic else self.smallest

    def write_float(self, model: Any, inputs: Sequence[Any], path: Path, shared: Callable[[], Any]) -> None:
        from lq_plugin.export.executorch_file import float_executorch

        float_executorch(model, inputs, path)

    def open(self, path: Path, inputs: Sequence[Any], threads: int) -> Callable[[], Any]:
        from lq_plugin.export.executorch_file import open_executorch

        run = open_executorch(path, threads).run
        return lambda: run(*inputs)


@register_target
class ExecuTorch(IntegerProgramTarget):
    """ExecuTorch programs; see `lq_plugin.export.executorch_file`."""

    name, suffix = "executorch", ".pte"
    summary = "ExecuTorch program for phones and small boards: integer convolutions, products and sums by XNNPACK"
    packages = runtimes = ("executorch",)
    timings: ClassVar = {"executorch": _Timing(name)}
    title = "XNNPACK"
    takes: ClassVar = {**TAKES, "input": (*TAKES["input"], "int8 per_token affine dynamic")}
    takes_dynamic = True

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.integer_program.faults import token_fault

        return token_fault(slot, spec, layer) if spec.dynamic else super().spec_fault(slot, spec, layer)

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        # XNNPACK's scale is (max - min) / 255 of a token.
        if spec.dynamic and spec.format_name == "int" and isinstance(spec.granularity, PerToken):
            return spec.replace(affine=True, narrow_range=False)
        return super().own_spec(slot, spec)

    def products(self, path: Path, runtime: str | None) -> Products:
        from lq_plugin.export.executorch_products import executorch_products

        return executorch_products(path)

    def write(self, request: Request) -> int:
        from lq_plugin.export.executorch_file import export_executorch

        return self.written(request, export_executorch)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.executorch_file import open_executorch

        return open_executorch(path)
