"""Modules of several weights in a graph step by step: LSTM, GRU, attention with quantizers of what is inside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import onnx
from torch import Tensor, nn

from lq_plugin.export.onnx_file.queries import modules_of
from lq_plugin.layers import OPERATIONS_CONTAINER, StateWeight, compound_family, show_steps
from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import quantized_layers


class _Mark(nn.Module):
    """Stands where a quantizer is; the graph has an Identity for it, which says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def show_quantized_steps(model: nn.Module, plain: nn.Module, silent: Collection[str]) -> set[str]:
    """Lets a float copy compute step by step what is quantized inside of an LSTM, an attention, ...

    Args:
        model: prepared and calibrated.
        plain: the copy; changed.
        silent: names of layers and operations that are float in the file.

    Returns:
        The names of these modules.
    """
    marks: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for name, layer in quantized_layers(model):
        if isinstance(layer, StateWeight) and layer.input_quantizer is not None and name not in silent:
            marks[name.removesuffix(layer.key).rstrip(".")].update()
    for name, operation in quantized_operations(model):
        owner, label = operation.operation.place
        if name not in silent and compound_family(plain.get_submodule(owner)) is not None:
            marks[owner][label] = nn.ModuleDict({key: _Mark() for key in operation._modules})
    for owner, module in plain.named_modules():
        # ONNX's LSTM has no projection, and torch 2.13 exports one as if there were none.
        if isinstance(module, nn.LSTM) and module.proj_size:
            marks[owner].update()
    for owner, inside in marks.items():
        show_steps(plain.get_submodule(owner), inside)
    return set(marks)


def marked_nodes(graph: onnx.GraphProto, name: str, operand: int) -> list[onnx.NodeProto]:
    """Returns the nodes that stand for a quantizer inside of a module, one for each of its calls.

    Args:
        graph: exported from what `show_quantized_steps` has changed.
        name: of the operation: `"lstm.cell_l0"`.
        operand: which of its operands.
    """
    owner, _, label = name.rpartition(".")
    mark = ".".join(filter(None, (owner, OPERATIONS_CONTAINER, label, f"input_{operand}_quantizer")))
    return [node for node in graph.node if node.op_type == "Identity" and modules_of(node)[-1:] == [mark]]
