"""Target `torchao`: integer matrix products of linear layers in torch itself."""

from __future__ import annotations

from lq_plugin.export.request import Request
from lq_plugin.export.target import Target, register_target


@register_target
class TorchAO(Target):
    """torchao's `Int8Tensor` in place of weights; see `lq_plugin.export.torchao`."""

    name, suffix = "torchao", None
    summary = "lq_plugin.export.use_torchao(model) makes linear layers torchao's int8 tensors, on CPU and GPU"
    packages = ("torchao",)

    def model_faults(self, request: Request) -> list[str]:
        from lq_plugin.export.faults import layers_with_kernel
        from lq_plugin.export.torchao import why_not

        return layers_with_kernel(request.model, why_not)[1]

    def write(self, request: Request) -> int:
        from lq_plugin.export.torchao import use_torchao

        use_torchao(request.model)
        return 0
