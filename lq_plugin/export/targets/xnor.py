"""Target `xnor`: layers of binary weights and inputs by exclusive or and bit count."""

from __future__ import annotations

from typing import Any, ClassVar

from lq_plugin.export.request import Request
from lq_plugin.export.target import Target, register_target
from lq_plugin.intent.spec import QuantSpec


@register_target
class XNOR(Target):
    """Compiled binary kernel; see `lq_plugin.export.xnor.layers`."""

    name, suffix = "xnor", None
    summary = "lq_plugin.export.use_xnor(model) computes sign x sign layers by exclusive or and bit count, on the CPU"
    takes: ClassVar = {"weight": ("bwn", "sign"), "input": ("sign", "xnor")}

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.faults import layers_with_kernel
        from lq_plugin.export.xnor.layers import why_not

        return layers_with_kernel(request.model, why_not)[1]

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.xnor.layers import spec_fault

        return spec_fault(slot, spec, layer)

    def write(self, request: Request) -> int:
        from lq_plugin.export.xnor.layers import use_xnor

        use_xnor(request.model)
        return 0
