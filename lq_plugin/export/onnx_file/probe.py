"""Views into an ONNX file for certificates: what its layers read, and how a runtime computes their products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lq_plugin.export.target import Products

#: Operations that multiply activations by weights, in a file.
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: What the names of dequantized weights end in.
_WEIGHT = ".weight_dequantized"


class Activation(NamedTuple):
    """Integer activation of a file.

    Args:
        codes: name of its tensor of integers.
        scale, zero_point: float and integer arrays.
        axis: of the scales, where there are several.
    """

    codes: str
    scale: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int

    def dequantize(self, codes: NDArray[Any]) -> NDArray[Any]:
        """Returns the real values of integers, float32."""
        shape = [1] * codes.ndim
        if self.scale.size > 1:
            shape[self.axis] = -1
        values = codes.astype(np.float32) - self.zero_point.astype(np.float32).reshape(shape)
        return values * self.scale.astype(np.float32).reshape(shape)


def layer_activations(model: Any) -> dict[str, Activation]:
    """Returns the integer input of each layer with a quantized weight, by the layer's name.

    Args:
        model: an `onnx.ModelProto` that `export_onnx` wrote.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not node.output[0].endswith(_WEIGHT):
            continue
        products = list(_products_of(node.output[0], readers))
        if len(products) != 1:
            continue  # a table that is looked up, or a weight that several layers share
        real = makers.get(products[0].input[0])
        if real is None or real.op_type != "DequantizeLinear" or real.input[0] in constants:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in real.attribute}
        scale = numpy_helper.to_array(constants[real.input[1]])
        zero = numpy_helper.to_array(constants[real.input[2]]) if len(real.input) > 2 else np.zeros_like(scale)
        name = node.output[0].removesuffix(_WEIGHT)
        found[name] = Activation(real.input[0], scale, zero, attributes.get("axis", 1))
    return found


def _products_of(weight: str, readers: dict[str, list[Any]]) -> Iterator[Any]:
    """Yields the products that read a weight, also after it was transposed or reshaped."""
    for node in readers.get(weight, []):
        if node.op_type in PRODUCTS and weight in node.input[1:]:
            yield node
        elif node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze"):
            yield from _products_of(node.output[0], readers)


def with_activations(activations: dict[str, Activation], model: Any) -> bytes:
    """Returns a copy of a file whose graph also gives these activations, as integers.

    Integers, because an output of real values would keep ONNX Runtime from computing the layer with integers.

    Args:
        activations: of `layer_activations`.
        model: an `onnx.ModelProto`; it is changed.
    """
    from onnx import helper

    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for name in dict.fromkeys(activation.codes for activation in activations.values()):
        kind = kinds[makers[name].input[2]]
        model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return model.SerializeToString()  # type: ignore[no-any-return]


def onnxruntime_products(path: Path) -> Products:
    """Returns how ONNX Runtime computes the products of a file, from the graph that it runs."""
    import tempfile

    import onnx

    from lq_plugin.export.runtime import onnx_session

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        onnx_session(path, optimized=optimized)
        nodes = onnx.load(optimized).graph.node
    kinds = Counter(node.op_type for node in nodes)
    integer = {kind: count for kind, count in kinds.items() if _is_integer(kind)}
    floating = {kind: n for kind, n in kinds.items() if kind.removeprefix("Fused") in (*PRODUCTS, "MatMulNBits")}
    return Products(integer, floating)


def _is_integer(kind: str) -> bool:
    """Returns True for ONNX Runtime's products of integers.

    >>> [_is_integer(kind) for kind in ("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearAdd", "FusedConv")]
    [True, True, True, False, False]
    """
    return kind in ("QLinearConv", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul") or kind.startswith(
        ("MatMulInteger", "ConvInteger")
    )


def openvino_products(compiled: Any) -> Products:
    """Returns how OpenVINO computes the products of a compiled model, from its runtime model."""
    integer: Counter[str] = Counter()
    floating: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        kind = str(info["layerType"].value) if "layerType" in info else ""
        if kind in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            precision = str(info["runtimePrecision"].value)
            (integer if precision in ("i8", "u8") else floating)[kind] += 1
    return Products(dict(integer), dict(floating))
