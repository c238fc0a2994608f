"""Nodes of an exported graph that read a layer's weight, and what they compute with it."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import onnx

CONV = ("Conv", "ConvTranspose")
MATRIX = ("MatMul", "Gemm")
_RECURRENT = ("LSTM", "GRU", "RNN")
#: Operations that take a parameter apart and put it together in another order.
_PARTS = (
    "Slice", "Split", "SplitToSequence", "SequenceAt", "Transpose", "Concat", "Unsqueeze", "Squeeze", "Identity",
    "Reshape", "Gather",
)  # fmt: skip
#: Operations that read only the shape or the type of a parameter.
_LOOKS = ("Shape", "CastLike")


def told(node: onnx.NodeProto, key: str) -> list[str]:
    """Returns a list that torch's exporter noted at a node; its last element is that of the operator itself."""
    found = next((entry.value for entry in node.metadata_props if entry.key.rpartition(".")[2] == key), "[]")
    return [str(item) for item in ast.literal_eval(found)]


def modules_of(node: onnx.NodeProto) -> list[str]:
    """Returns names of the modules in whose forward a node is computed, the model's own ("") first."""
    return told(node, "name_scopes")[:-1]


def readers(graph: onnx.GraphProto, source: str, modules: Collection[str]) -> list[onnx.NodeProto]:
    """Returns the nodes that read a parameter in the forward of a module, by any of its names.

    Other nodes also read it where it is tied or read past its layer (`F.linear(x, self.embedding.weight)`).

    Args:
        graph: exported.
        source: initializer of the parameter.
        modules: names of the module.
    """
    return [node for node in graph.node if source in node.input and not set(modules).isdisjoint(modules_of(node))]


def calls(graph: onnx.GraphProto, users: Sequence[onnx.NodeProto]) -> tuple[list[onnx.NodeProto], bool]:
    """Returns the nodes that compute with a parameter, directly or through a Transpose, and True in the second case."""
    users = [node for node in users if node.op_type not in _LOOKS]
    turned = {node.output[0] for node in users if node.op_type == "Transpose"}
    if not users or len(turned) != len(users):
        return users, False
    return [node for node in graph.node if turned.intersection(node.input)], True


def layer_calls(
    graph: onnx.GraphProto, users: Sequence[onnx.NodeProto], layer: Any
) -> tuple[list[onnx.NodeProto], bool] | None:
    """Returns `calls` of a layer, one node for each run of it, or None where its own forward does something else.

    Args:
        graph: exported.
        users: nodes that read the weight.
        layer: quantized.
    """
    found, transposed = calls(graph, users)
    kinds = {node.op_type for node in found}
    if len(kinds) != 1 or not kinds.issubset((*CONV, *MATRIX, "Gather")):
        return None
    for node in found:
        if node.op_type == "Conv" and layer.bias is None and len(node.input) == 3:
            node.input.pop()  # the exporter makes zeros of it
    return found, transposed


def products(graph: onnx.GraphProto, source: str, users: Sequence[onnx.NodeProto]) -> list[tuple[onnx.NodeProto, int]]:
    """Returns nodes that multiply an input with a parameter that some nodes read, or a part of it; and which input.

    Args:
        graph: exported.
        source: initializer of the parameter.
        users: nodes that read it.
    """
    parts: set[str] = set()
    found = []
    for node in graph.node:
        if parts.intersection(node.input) or (source in node.input and node in users):
            if node.op_type in (*MATRIX, *_RECURRENT, "Einsum"):
                found.append((node, int(node.input[0] in (source, *parts))))
            elif node.op_type in _PARTS:
                parts.update(node.output)
    return found


def readers_by_name(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Returns the nodes that read each tensor, in the order of the graph."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(names_read(node)):
            found.setdefault(name, []).append(node)
    return found


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Yields the values that a node reads, by its inputs or in its bodies (of If and Loop)."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from names_read(inner)


def tensor_type(graph: onnx.GraphProto, name: str) -> Any:
    """Returns type and shape of a value, as the exporter noted them; None: it did not."""
    values = (*graph.value_info, *graph.input)
    return next((value.type.tensor_type for value in values if value.name == name), None)
