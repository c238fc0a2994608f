"""Target `packed`: every format at its own number of bits, read back bit for bit by torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lq_plugin.export.request import Request
from lq_plugin.export.target import Reader, Target, register_target


@register_target
class Packed(Target):
    """Packed files; see `lq_plugin.export.packed`."""

    name, suffix = "packed", ".safetensors"
    summary = "every format at its own bits, bit-equal in PyTorch (load_packed)"
    takes_dynamic = True

    def write(self, request: Request) -> int:
        from lq_plugin.export.packed import save_packed

        assert request.path is not None
        return save_packed(request.model, request.path, request.inputs)

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        from lq_plugin.export.packed import load_packed

        model = self.float_model(path, fresh)
        load_packed(model, path)
        return Reader(model)
