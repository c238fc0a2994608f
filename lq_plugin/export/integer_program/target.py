"""Base of the targets whose files are integer programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lq_plugin.export.integer_program.options import BATCH, TAKES
from lq_plugin.export.request import Request
from lq_plugin.export.target import Target
from lq_plugin.intent.spec import QuantSpec


class IntegerProgramTarget(Target):
    """Target of signed bytes from end to end; see `lq_plugin.export.integer_program`."""

    #: The runtime's own name, for messages.
    title: ClassVar[str]
    options = (BATCH,)
    needs_inputs = integer_biases = one_grid = True
    takes: ClassVar = TAKES

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.integer_program.faults import model_faults

        return super().model_faults(request) + model_faults(request, self.title)

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.integer_program.faults import spec_fault

        return spec_fault(slot, spec, layer, self.title)

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        # Symmetric weights of a byte have no -128.
        byte = slot == "weight" and spec.is_uniform and spec.bit_width == 8 and spec.signed and not spec.affine
        return spec.replace(narrow_range=True) if byte else spec

    def written(self, request: Request, export: Callable[..., int]) -> int:
        """Returns the size of the file that `export` (`export_litert`, `export_executorch`) writes for a request."""
        assert request.path is not None
        assert request.inputs is not None
        batch = self.settings(request)["batch"]
        return export(request.model, request.inputs, request.path, request.batches, batch)

    def needs_batches(self, options: Mapping[str, Any]) -> bool:
        return True
