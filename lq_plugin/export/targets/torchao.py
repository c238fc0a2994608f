"""Target `torchao`: integer matrix products of linear layers in torch itself."""

from __future__ import annotations

from typing import Any, ClassVar

from lq_plugin.export.request import Request
from lq_plugin.export.target import Target, register_target
from lq_plugin.intent.spec import QuantSpec


@register_target
class TorchAO(Target):
    """torchao's `Int8Tensor` in place of weights; see `lq_plugin.export.torchao`."""

    name, suffix = "torchao", None
    summary = "lq_plugin.export.use_torchao(model) makes linear layers torchao's int8 tensors, on CPU and GPU"
    packages = ("torchao",)
    takes: ClassVar = {"weight": ("int8 per_channel", "int4 per_channel"), "input": ("uint8 affine", "int8")}

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.faults import layers_with_kernel
        from lq_plugin.export.torchao import why_not

        return layers_with_kernel(request.model, why_not)[1]

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        from lq_plugin.export.torchao import spec_fault

        return spec_fault(slot, spec, layer)

    def write(self, request: Request) -> int:
        from lq_plugin.export.torchao import use_torchao

        use_torchao(request.model)
        return 0
