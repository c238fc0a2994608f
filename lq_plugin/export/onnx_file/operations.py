"""Nodes of an exported graph for the operations that a recording names: `block.add_0`, `cat_0`, `act.hardswish_0`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import onnx

from lq_plugin.export.onnx_file.queries import modules_of, told
from lq_plugin.model.operations.quantized import Operation

#: Operator of torch's exporter and of ONNX, for each operation whose operands both have in one order.
_MEETINGS = {
    "add": ("aten.add.Tensor", "Add"),
    "sub": ("aten.sub.Tensor", "Sub"),
    "mul": ("aten.mul.Tensor", "Mul"),
    "matmul": ("aten.matmul.default", "MatMul"),
    "bmm": ("aten.bmm.default", "MatMul"),
    "mm": ("aten.mm.default", "MatMul"),
    "cat": ("aten.cat.default", "Concat"),
}
#: Of one operand.
_UNARY = {
    "hardswish": ("aten.hardswish.default", "HardSwish"),
    "hardsigmoid": ("aten.hardsigmoid.default", "HardSigmoid"),
    "gelu": ("aten.gelu.default", "Gelu"),
    "sigmoid": ("aten.sigmoid.default", "Sigmoid"),
    "tanh": ("aten.tanh.default", "Tanh"),
    "mean": ("aten.mean.dim", "ReduceMean"),
}
_OPERATORS = _MEETINGS | _UNARY
_OF_ONE = frozenset(operator for _, operator in _UNARY.values())


def operation_nodes(model: onnx.ModelProto, operations: Iterable[Operation]) -> dict[str, onnx.NodeProto]:
    """Returns the node of each operation.

    Nodes carry the module and the operator they were exported from. Those of one module and kind whose operands depend
    on the model's inputs come in the order in which a recording counts them.

    Args:
        model: as torch's exporter made it, with its metadata.
        operations: all that one recorded pass has shown.

    Returns:
        Nodes by name. Operations are left out which the exporter takes apart (attention), and all of a module and kind
        of which the graph has another number, as where the module is called twice.
    """
    recorded: dict[tuple[str, str], list[str]] = defaultdict(list)
    for operation in operations:
        recorded[operation.place[0], operation.op].append(operation.name)
    nodes: dict[str, onnx.NodeProto] = {}
    found = _by_place(model)
    for (owner, op), names in recorded.items():
        known = found.get((owner, *_OPERATORS[op]), []) if op in _OPERATORS else []
        if len(known) == len(names):
            nodes |= dict(zip(names, known, strict=True))
    return nodes


def _by_place(model: onnx.ModelProto) -> dict[tuple[str, str, str], list[onnx.NodeProto]]:
    """Returns the nodes in which activations meet, or of one activation, by the module, torch's operator and ONNX's."""
    activations = {value.name for value in model.graph.input}
    places: dict[tuple[str, str, str], list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        read = [value in activations for value in node.input]
        if any(read) and node.op_type != "Shape":
            activations.update(node.output)
        if sum(read) < (1 if node.op_type in _OF_ONE else 2):
            continue
        modules, kinds = modules_of(node), told(node, "class_hierarchy")
        if modules and kinds:
            places[modules[-1], kinds[-1], node.op_type].append(node)
    return places
