"""Target `tensorrt`: an ONNX file under TensorRT's rules for explicit quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.target import register_target
from lq_plugin.export.targets.onnx import ONNX
from lq_plugin.intent.ranges import range_kind
from lq_plugin.intent.spec import QuantSpec


@register_target
class TensorRT(ONNX):
    """Files for TensorRT's parser; see `lq_plugin.export.tensorrt`.

    Every file is checked against NVIDIA's documented rules by `lq_plugin.export.tensorrt.lint` before it is written.
    `verify` runs it in ONNX Runtime: nobody has run TensorRT on these files yet.
    """

    name, by_suffix = "tensorrt", False
    summary = "the graph under TensorRT's rules for explicit quantization: signed INT8 and INT4, no zero points; linted"
    runtimes = ("onnxruntime",)
    timings: ClassVar = {}  # it computes the numbers, and says nothing of TensorRT's times
    integer_biases = False
    options = tuple(option for option in ONNX.options if option.name == "dynamic_dims")

    def form(self, settings: Mapping[str, Any]) -> Form:
        from lq_plugin.export.tensorrt.form import TENSORRT

        return TENSORRT

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        # Signed integers with zero point 0. PACT clips at 0, where half of the signed levels would be of no use.
        symmetric = slot != "weight" and spec.is_uniform and not range_kind(spec.range_name).non_negative
        return spec.replace(signed=True, affine=False) if symmetric else spec
