"""Views into an ONNX file for certificates: what its layers read, and how a runtime computes their products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
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
    """Quantized activation of a file.

    Args:
        codes: name of its tensor of integers, or of the real values of FP8 numbers, which numpy has no type for.
        scale, zero_point: arrays, or names of the tensors that hold what was found at run time.
        axis: of the scales, where there are several.
    """

    codes: str
    scale: NDArray[Any] | str
    zero_point: NDArray[Any] | str
    axis: int

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that `dequantize` needs."""
        return [part for part in self[:3] if isinstance(part, str)]

    def dequantize(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Returns the real values, float32.

        Args:
            tensors: by name.
        """
        codes, scale, zero_point = (tensors[part] if isinstance(part, str) else part for part in self[:3])
        shape = [1] * codes.ndim
        if scale.size > 1:
            shape[self.axis] = -1
        values = codes.astype(np.float32) - zero_point.astype(np.float32).reshape(shape)
        return values * scale.astype(np.float32).reshape(shape)


def layer_activations(model: Any) -> dict[str, Activation]:
    """Returns the quantized input of each layer with a quantized weight, by the layer's name.

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
        scale, zero = (
            numpy_helper.to_array(constants[name]) if name in constants else name or np.zeros((), np.uint8)
            for name in [*real.input, ""][1:3]  # other tools leave out a zero point of 0
        )
        codes = real.input[0]
        if not isinstance(zero, str) and zero.dtype.kind not in "iu":
            codes, scale, zero = real.output[0], np.ones((), np.float32), np.zeros((), np.float32)
        name = node.output[0].removesuffix(_WEIGHT)
        found[name] = Activation(codes, scale, zero, attributes.get("axis", 1))
    return found


def _products_of(weight: str, readers: dict[str, list[Any]]) -> Iterator[Any]:
    """Yields the products that read a weight, also after it was transposed or reshaped."""
    for node in readers.get(weight, []):
        if node.op_type in PRODUCTS and weight in node.input[1:]:
            yield node
        elif node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze"):
            yield from _products_of(node.output[0], readers)


def with_activations(activations: dict[str, Activation], model: Any) -> bytes:
    """Returns a copy of a file whose graph also gives these activations, as they are stored.

    Stored numbers, because an output of real values would keep ONNX Runtime from computing the layer with integers.

    Args:
        activations: of `layer_activations`.
        model: an `onnx.ModelProto`; it is changed.
    """
    from onnx import TensorProto, helper

    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for name in dict.fromkeys(name for activation in activations.values() for name in activation.tensors):
        maker = makers[name]
        if maker.op_type == "QuantizeLinear":
            kind = kinds[maker.input[2]]
        else:
            real = maker.op_type == "DequantizeLinear" or name == maker.output[1]
            kind = TensorProto.FLOAT if real else TensorProto.UINT8
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
