"""Target `litert`: a `.tflite` file that computes with integers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lq_plugin.export.integer_program.target import IntegerProgramTarget
from lq_plugin.export.integer_program.timing import ProgramTiming
from lq_plugin.export.request import Request
from lq_plugin.export.target import Products, Reader, register_target
from lq_plugin.intent.spec import QuantSpec


class _Timing(ProgramTiming):
    suffix = ".tflite"

    def write_float(self, model: Any, inputs: Sequence[Any], path: Path, shared: Callable[[], Any]) -> None:
        from lq_plugin.export.litert_file import float_litert

        float_litert(model, inputs, path)

    def open(self, path: Path, inputs: Sequence[Any], threads: int) -> Callable[[], Any]:
        from lq_plugin.export.litert_file import timed_litert

        return timed_litert(path, inputs, threads)


@register_target
class LiteRT(IntegerProgramTarget):
    """TensorFlow Lite files; see `lq_plugin.export.litert_file`."""

    name, suffix = "litert", ".tflite"
    summary = "TensorFlow Lite file of integers alone, for phones and microcontrollers (LiteRT)"
    packages, runtimes = ("ai_edge_litert", "litert_torch"), ("ai_edge_litert",)
    timings: ClassVar = {"ai_edge_litert": _Timing(name)}
    title = "LiteRT"

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from torch import nn

        if slot == "weight" and isinstance(layer, nn.ConvTranspose2d):
            return "litert_torch writes transposed convolutions in float: leave its weight float"
        return super().spec_fault(slot, spec, layer)

    def products(self, path: Path, runtime: str | None) -> Products:
        from lq_plugin.export.litert_file import litert_products

        return litert_products(path)

    def write(self, request: Request) -> int:
        from lq_plugin.export.litert_file import export_litert

        return self.written(request, export_litert)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.litert_file import open_litert

        return open_litert(path)
