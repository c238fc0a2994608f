"""Words for the nodes of an integer program, and changes to it."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lq_plugin.export.integer_program.form import PRODUCTS

QUANTIZE, DEQUANTIZE = (
    "quantized_decomposed.quantize_per_tensor.default",
    "quantized_decomposed.dequantize_per_tensor.default",
)
TOKENS = "quantized_decomposed.dequantize_per_token.default"
STORED = "quantized_decomposed.dequantize_per_channel.default"
#: Levels of every activation: those of a byte.
LOW, HIGH = -128, 127
#: Levels of every weight: TFLite's specification has no -128 (https://ai.google.dev/edge/litert/conversion/tensorflow/
#: quantization/quantization_spec), and 16-bit sums of two products overflow with it.
WEIGHT_LOW, WEIGHT_HIGH = -127, 127


class Grid(NamedTuple):
    """Signed 8-bit levels: x = scale · (q - zero_point)."""

    scale: float
    zero_point: int

    def code(self, value: float) -> float:
        """Returns the level nearest to a real number, without clipping."""
        return round(value / self.scale) + self.zero_point if math.isfinite(value) else value


def operations() -> Any:
    """Returns torch's namespace of quantize and dequantize operators."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


def kind(node: Any) -> str:
    """Returns the operator of a node; empty for inputs, constants and outputs."""
    return str(node.target) if isinstance(node, Node) and node.op == "call_function" else ""


def grid_of(node: Node) -> Grid:
    """Returns the grid of a quantize or dequantize node."""
    scale, zero_point = node.args[1:3]
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    return Grid(scale, zero_point)


def is_float(node: Node) -> bool:
    """Returns True for a node that makes one float tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def constant(module: GraphModule, node: Any) -> Tensor | None:
    """Returns the tensor that a node reads from the module; None: it is no constant."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found = reduce(getattr, str(node.target).split("."), module)
    assert isinstance(found, Tensor)
    return found.detach()


def put_constant(module: GraphModule, name: str, value: Tensor) -> Node:
    """Adds a constant where the graph inserts now; returns its node.

    Args:
        module: changed.
        name: begins the name of the buffer.
        value: the tensor.
    """
    number = sum(1 for _ in module.named_buffers())
    key = f"{name}_{number}".replace(".", "_")
    module.register_buffer(key, value)
    node = module.graph.get_attr(key)
    node.meta["val"] = value
    return node


def quantize(module: GraphModule, value: Node, grid: Grid) -> Node:
    """Adds a quantize node where the graph inserts now.

    Args:
        module: with the graph.
        value: what is quantized.
        grid: its scale, zero point and integers.
    """
    args = (value, *grid, LOW, HIGH, torch.int8)
    return _call(module, operations().quantize_per_tensor.default, args, value, torch.int8)


def dequantize(module: GraphModule, codes: Node) -> Node:
    """Adds a dequantize node of a quantize node where the graph inserts now."""
    args = (codes, *grid_of(codes), LOW, HIGH, torch.int8)
    return _call(module, operations().dequantize_per_tensor.default, args, codes, torch.float32)


def _call(module: GraphModule, operator: Any, args: tuple[Any, ...], like: Node, dtype: torch.dtype) -> Node:
    node = module.graph.call_function(operator, args)
    node.meta["val"] = like.meta["val"].to(dtype)
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    return node


def operands(node: Node) -> list[Node]:
    """Returns the float tensors that a node computes with, without the weight and bias of a product."""
    found = node.all_input_nodes[:1] if kind(node) in PRODUCTS else node.all_input_nodes
    return [value for value in found if value.op != "get_attr" and is_float(value)]


def place(node: Node) -> str:
    """Returns the name of the model's module that a node belongs to, and its operator: for messages."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    owner = stack[-1][0] if stack else ""
    return f"{owner or 'the model'} ({kind(node).removeprefix('aten.').partition('.')[0] or node.name})"
