"""Target `executorch`: a `.pte` program that computes with XNNPACK's integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lq_plugin.export.integer_program.target import IntegerProgramTarget
from lq_plugin.export.request import Request
from lq_plugin.export.target import Products, Reader, register_target


@register_target
class ExecuTorch(IntegerProgramTarget):
    """ExecuTorch programs; see `lq_plugin.export.executorch_file`."""

    name, suffix = "executorch", ".pte"
    summary = "ExecuTorch program for phones and small boards: integer convolutions, products and sums by XNNPACK"
    packages = runtimes = ("executorch",)
    title = "XNNPACK"

    def products(self, path: Path, runtime: str | None) -> Products:
        from lq_plugin.export.executorch_products import executorch_products

        return executorch_products(path)

    def write(self, request: Request) -> int:
        from lq_plugin.export.executorch_file import export_executorch

        return self.written(request, export_executorch)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.executorch_file import open_executorch

        return open_executorch(path)
