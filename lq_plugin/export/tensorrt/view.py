"""View of a graph for the linter: types, shapes and constants of tensors, and their readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

#: TensorRT's quantized types.
QUANTIZED = tuple(
    getattr(TensorProto, name)
    for name in ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
    if hasattr(TensorProto, name)  # the last one came with onnx 1.18
)
QDQ = ("QuantizeLinear", "DequantizeLinear")


class View:
    """Graph of a model with those inside its nodes (bodies of If and Loop), whose tensors have names of their own.

    Args:
        model: any.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        graphs = list(_graphs(onnx.shape_inference.infer_shapes(model).graph))
        self.nodes = [node for graph in graphs for node in graph.node]
        self.pairs = [node for node in self.nodes if node.op_type in QDQ]
        self.tensors = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
        for node in self.nodes:
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and value is not None:
                self.tensors[node.output[0]] = value
        self.types: dict[str, int] = {name: tensor.data_type for name, tensor in self.tensors.items()}
        self.shapes: dict[str, tuple[int | None, ...]] = {name: (*t.dims,) for name, t in self.tensors.items()}
        self.outside = {value.name for value in (*model.graph.input, *model.graph.output)}
        for graph in graphs:
            for info in (*graph.input, *graph.output, *graph.value_info):
                self._describe(info)
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        #: Tensors on the integer side of Q/DQ nodes, and zero points.
        self.codes = {node.output[0] if node.op_type == QDQ[0] else node.input[0] for node in self.pairs}
        self.codes |= {node.input[2] for node in self.pairs if len(node.input) == 3}

    def _describe(self, info: onnx.ValueInfoProto) -> None:
        kind = info.type.tensor_type
        if info.name not in self.types and kind.elem_type:
            self.types[info.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[info.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)

    def constant(self, name: str) -> NDArray[Any] | None:
        """Returns the value of a constant; None: it is computed."""
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def is_constant(self, name: str) -> bool:
        """Returns True where only constants go into a tensor."""
        node = self.producer.get(name)
        return name in self.tensors or (node is not None and all(self.is_constant(read) for read in node.input if read))

    def scales(self) -> Iterator[tuple[onnx.NodeProto, NDArray[Any]]]:
        """Yields the Q/DQ nodes whose scales are constants, and these."""
        for node in self.pairs:
            if (scale := self.constant(node.input[1])) is not None:
                yield node, scale.astype(np.float64)

    def quantized_type(self, node: onnx.NodeProto) -> int:
        """Returns the type of the integer side of a Q/DQ node; ONNX's is UINT8 where a QuantizeLinear has none."""
        if node.op_type == "DequantizeLinear":
            return self.types.get(node.input[0], TensorProto.UNDEFINED)
        if len(node.input) == 3 and node.input[2]:
            return self.types.get(node.input[2], TensorProto.UNDEFINED)
        return _attribute(node, "output_dtype", 0) or int(TensorProto.UINT8)

    def axis(self, node: onnx.NodeProto) -> int:
        """Returns the axis of the scales of a Q/DQ node."""
        return _attribute(node, "axis", 1)

    def block(self, node: onnx.NodeProto) -> int:
        """Returns the elements that share a scale of a Q/DQ node; 0: it has no blocks."""
        return _attribute(node, "block_size", 0)

    def output_axis(self, node: onnx.NodeProto, weight: str, dims: int) -> int | None:
        """Returns the axis of the output channels of a product whose second operand a weight is, else None.

        Args:
            node: of the product.
            weight: name of the operand.
            dims: of the weight.
        """
        if len(node.input) < 2 or node.input[1] != weight:
            return None
        gemm = 0 if _attribute(node, "transB", 0) else 1
        return {"Conv": 0, "ConvTranspose": 1, "Gemm": gemm, "MatMul": dims - 1}.get(node.op_type)


def type_name(kind: int | None) -> str:
    """Returns ONNX's name of a type.

    >>> type_name(2)
    'UINT8'
    """
    return str(TensorProto.DataType.Name(kind or 0))


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(helper.get_attribute_value(a)) for a in node.attribute if a.name == name), default)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)
