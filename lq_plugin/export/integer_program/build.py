"""Conversion of a quantized model to an integer program."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from lq_plugin.errors import ExportError
from lq_plugin.export.integer_program.batch_norm import fold_batch_norms
from lq_plugin.export.integer_program.biases import settle_weight_scales
from lq_plugin.export.integer_program.form import IntegerForm
from lq_plugin.export.integer_program.graph import LOW, Grid, operations, place, put_constant
from lq_plugin.export.integer_program.pieces import pieces
from lq_plugin.export.integer_program.product import products
from lq_plugin.export.integer_program.settle import Settlement
from lq_plugin.export.integer_program.trace import traced
from lq_plugin.export.quiet import quiet
from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.ranges import Histogram, estimate_range

log = logging.getLogger(__name__)
_GRID = QuantSpec.parse("uint8 affine").grid


def integer_program(
    model: nn.Module, inputs: Sequence[Any], batches: Sequence[Any] | None, form: IntegerForm
) -> ExportedProgram:
    """Returns a prepared and calibrated model as a program that a runtime computes with integers.

    Args:
        model: prepared, with specs that the runtime takes; it is not changed.
        inputs: positional arguments of its forward, as an example; the program takes tensors of these shapes.
        batches: calibration batches, each like `inputs` or its only tensor, for the ranges of tensors that the plan
            leaves float and the runtime rounds. None: there are no such tensors.
        form: of the runtime.

    Raises:
        ExportError: torch cannot trace the model, or ranges are missing and there are no batches.
    """
    module = traced(model, inputs)
    fold_batch_norms(module)
    settlement = Settlement(module, form)
    settlement.put(_ranges(module, settlement.missing(), inputs, batches, form))
    settle_weight_scales(module)
    _say_half_bytes(module)
    if form.float_weights:
        _quantize_weights(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    _drop_unread(module)
    module.recompile()
    with quiet("torch"), torch.no_grad():
        return torch.export.export(module, tuple(inputs), strict=False)


def _drop_unread(module: GraphModule) -> None:
    """Removes parameters and buffers that no node reads: programs carry them along otherwise."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, _ in tensors:
        if name not in read:
            owner, _, key = name.rpartition(".")
            delattr(module.get_submodule(owner), key)


def _ranges(
    module: GraphModule, nodes: list[Node], inputs: Sequence[Any], batches: Sequence[Any] | None, form: IntegerForm
) -> dict[Node, Grid]:
    """Returns the grids of nodes, from running the graph on calibration data.

    The model's outputs keep their extremes; other tensors have the range of the least mean squared error.
    """
    if not nodes:
        return {}
    listed = ", ".join(dict.fromkeys(place(node) for node in nodes[:8])) + ", ..." * (len(nodes) > 8)
    if not batches:
        raise ExportError(
            f"{form.runtime} rounds {len(nodes)} results that the plan leaves float, and their ranges need calibration "
            f"data: give batches=[...]. They are {listed}"
        )
    log.warning("%s rounds %d results that the plan leaves float: %s", form.runtime, len(nodes), listed)
    size = next((len(x) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.ndim), None)
    found = _Observer(module, nodes)
    with torch.no_grad():
        for batch in batches:
            args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            for piece in pieces(args, size, drop=True):
                found.run(*piece)
    ends = {value for node in module.graph.nodes if node.op == "output" for value in node.all_input_nodes}
    return {node: _grid("minmax" if node in ends else "mse", found.seen[node]) for node in nodes}


def _grid(name: str, seen: Histogram) -> Grid:
    scale, zero_point = qparams_from_bounds(*estimate_range(name, seen.sample(), _GRID), _GRID)
    return Grid(float(scale), int(zero_point) + LOW)


class _Observer(Interpreter):
    """Runs the graph, and gathers the values of some nodes."""

    def __init__(self, module: GraphModule, nodes: Sequence[Node]) -> None:
        super().__init__(module)
        self.seen = {node: Histogram(name=place(node)) for node in nodes}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.seen:
            self.seen[n].update(value.detach())
        return value


def _say_half_bytes(module: GraphModule) -> None:
    """Gives integers of 4 bits next to tokens their own ends: XNNPACK holds half a byte of each then."""
    for product in products(module):
        weight: Any = product.node.args[1]
        if product.reads_tokens and product.codes.min() >= -8 and product.codes.max() <= 7:
            weight.args = (*weight.args[:4], -8, 7, *weight.args[6:])


def _quantize_weights(module: GraphModule) -> None:
    """Lets float constants be quantized in the graph, where integers stand: the converter folds them again."""
    for product in products(module):
        weight: Any = product.node.args[1]
        with module.graph.inserting_before(weight):
            real = put_constant(module, "weight", product.codes.float() * product.along_channels(product.scale))
            codes = module.graph.call_function(operations().quantize_per_channel.default, (real, *weight.args[1:]))
        codes.meta["val"] = product.codes
        weight.args = (codes, *weight.args[1:])
