"""Choices that a runtime makes for its integer programs, and what it cannot hold. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Products, by the name of torch's operator, as `str(node.target)` gives it.
PRODUCTS = frozenset(
    {"aten.conv1d.default", "aten.conv2d.default", "aten.conv_transpose2d.input", "aten.linear.default"}
)
#: Operations that only move values: their result has the grid of what they read.
MOVES = frozenset({
    "aten.view.default", "aten.reshape.default", "aten.flatten.using_ints", "aten.permute.default",
    "aten.transpose.int", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default",
    "aten.slice.Tensor", "aten.select.int", "aten.expand.default", "aten.pad.default", "aten.constant_pad_nd.default",
    "aten.max_pool2d.default", "aten.upsample_nearest2d.vec", "aten.channel_shuffle.default",
    "aten.pixel_shuffle.default",
})  # fmt: skip


@dataclass(frozen=True)
class IntegerForm:
    """Operations and types that a runtime computes with integers.

    Args:
        runtime: its name, for messages.
        operations: operators, besides `PRODUCTS` and `MOVES`, that it computes with integers where an operand is one.
        moves: further operators whose result has to have the grid of what they read.
        fused: activations that it computes as part of the operation before, so that nothing is rounded between.
        fixed: scale and zero point that results of an operator have to have.
        loses_roundings: where a rounded value is rounded again to another grid, one of the two is lost; a product with
            1 stands between them then.
        float_weights: weights are float constants that are quantized in the graph; False: integers.
    """

    runtime: str
    operations: frozenset[str]
    moves: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    loses_roundings: bool = False
    float_weights: bool = False

    def computes(self, operator: str) -> bool:
        """Returns True for operators, besides products and moves, that run as integers."""
        return operator in self.operations

    def moves_values(self, operator: str) -> bool:
        """Returns True for operators whose result has the grid of what they read."""
        return operator in MOVES or operator in self.moves
