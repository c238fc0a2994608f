"""Products of an integer program: convolutions and linear layers with a stored weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lq_plugin.export.integer_program.form import PRODUCTS
from lq_plugin.export.integer_program.graph import QUANTIZE, STORED, TOKENS, constant, grid_of, kind, put_constant


class Product:
    """One product, and the constants that it reads.

    Args:
        module: that it is in.
        node: of the operation.
    """

    def __init__(self, module: GraphModule, node: Node) -> None:
        self.module, self.node = module, node
        weight = self._weight
        codes, scale = (constant(module, value) for value in weight.args[:2])
        assert codes is not None
        assert scale is not None
        #: int8, in the shape that the layer holds its weight in; float32 `[C_out]`.
        self.codes, self.scale = codes, scale
        #: Of the output channels in `codes`.
        self.axis = int(weight.args[3])
        #: float32 `[C_out]`, zeros where the layer has none.
        found = constant(module, node.args[2]) if len(node.args) > 2 else None
        self.bias = torch.zeros_like(scale) if found is None else found

    @property
    def _weight(self) -> Any:
        return self.node.args[1]

    def along_channels(self, values: Tensor) -> Tensor:
        """Returns values `[C_out]` in the shape that broadcasts against `codes`."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return values.view(shape)

    @property
    def reads_tokens(self) -> bool:
        """True where scales of its input are found at run time; its result and bias are float then."""
        return kind(self.node.args[0]) == TOKENS

    @property
    def input_scale(self) -> float:
        """Step of the activation that it reads."""
        before: Any = self.node.args[0]
        return grid_of(before).scale

    @property
    def output_scale(self) -> float:
        """Step of its result, after the activation that is fused to it."""
        node = self.node
        while kind(node) != QUANTIZE:
            node = next(iter(node.users))
        return grid_of(node).scale

    def replace(self, codes: Tensor, scale: Tensor, bias: Tensor) -> None:
        """Gives it another weight and bias; other readers of the present ones keep them.

        Args:
            codes, scale, bias: as in the attributes.
        """
        weight, name = self._weight, str(self._weight.args[0].target).rpartition(".")[0] or "weight"
        with self.module.graph.inserting_before(self.node):
            held = [put_constant(self.module, f"{name}_{key}", x) for key, x in (("codes", codes), ("scale", scale))]
            stored = self.module.graph.call_function(weight.target, (*held, *weight.args[2:]))
            stored.meta.update(weight.meta)
            added = put_constant(self.module, f"{name}_bias", bias)
        self.node.args = (self.node.args[0], stored, added, *self.node.args[3:])
        if not weight.users:
            self.module.graph.erase_node(weight)


def products(module: GraphModule) -> Iterator[Product]:
    """Yields the products of a graph whose weights are stored as integers."""
    for node in list(module.graph.nodes):
        if kind(node) in PRODUCTS and kind(node.args[1]) == STORED:
            yield Product(module, node)
