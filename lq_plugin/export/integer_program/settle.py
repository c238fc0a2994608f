"""A grid for every tensor that an integer operation reads or writes.

A plan says what layers read. A runtime computes a convolution with integers only where its result is also rounded, and
a sum only where both operands and the result are:

    before   conv ───────────► add ─► relu ─► Q ─► DQ ─► conv
    after    conv ─► Q ─► DQ ─► add ─► relu ─► Q ─► DQ ─► conv
             (shortcut) ─► DQ ─┘

A tensor has one grid: the one that a reader asks for by a quantize node, also after operations that only move values;
of several the finest, from which the others are rounded again. Where nobody asks, the range comes from calibration
data. This may be more rounding than the plan asks for: compare with `lq_plugin.export.verify`, or quantize operands of
sums and outputs in the plan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lq_plugin.export.integer_program.form import PRODUCTS, IntegerForm
from lq_plugin.export.integer_program.graph import (
    DEQUANTIZE,
    HIGH,
    LOW,
    QUANTIZE,
    STORED,
    TOKENS,
    Grid,
    dequantize,
    grid_of,
    is_float,
    kind,
    operands,
    place,
    put_constant,
    quantize,
)

log = logging.getLogger(__name__)
_JOIN = "aten.cat.default"
#: On which 1 is a level, and a product with it has exactly the scale of the other factor.
_ONE = Grid(2.0**-6, 0)
#: Activations that clip, and their bounds where the graph does not say them.
_CLAMPS = {"aten.relu.default": (0.0, None), "aten.hardtanh.default": (-1.0, 1.0), "aten.clamp.default": (None, None)}


class Settlement:
    """Tensors of a program that need a grid, and their grids.

    Args:
        module: traced, batch norms folded; `put` changes it.
        form: of the runtime.
    """

    def __init__(self, module: GraphModule, form: IntegerForm) -> None:
        self.module, self.form = module, form
        #: Nodes whose value has to be on a grid. Moves are not among them: they have that of what they read.
        self.needed: dict[Node, None] = {}
        self.grids: dict[Node, Grid] = {}
        self._find()
        for node in self.needed:
            asked = list(dict.fromkeys(self._asked(node)))
            if asked:
                self.grids[node] = min(asked, key=lambda grid: grid.scale)
                if len(asked) > 1:
                    log.warning(
                        "%s: its readers have %d scales, %s computes it with the finest and rounds again",
                        place(node), len(asked), form.runtime,
                    )  # fmt: skip
            elif kind(node) in form.fixed:
                self.grids[node] = Grid(*form.fixed[kind(node)])

    def missing(self) -> list[Node]:
        """Returns the nodes that need a grid and have none yet."""
        return [node for node in self.needed if node not in self.grids]

    def _find(self) -> None:
        """Finds the operations that run as integers, in the order of the graph, and what they read and write."""
        integer: set[Node] = set()
        for node in self.module.graph.nodes:
            if kind(node) == DEQUANTIZE:
                integer.add(node)
            elif not is_float(node) or kind(node) in ("", QUANTIZE, STORED):
                continue
            elif kind(node) in PRODUCTS:
                # The result of a product of tokens is float.
                if kind(node.args[1]) == STORED and kind(node.args[0]) != TOKENS:
                    self._need(node, integer)
            elif self.form.moves_values(kind(node)):
                if operands(node)[0] in integer:
                    integer.add(node)
            elif (self.form.computes(kind(node)) or self._is_fused(node)) and any(
                value in integer for value in operands(node)
            ):
                self._need(node, integer)
        self._read = integer

    def _need(self, node: Node, integer: set[Node]) -> None:
        """Notes that an operation runs as integers."""
        for value in operands(node):
            source = self._source(value)
            if kind(source) != DEQUANTIZE:
                self.needed[source] = None
            integer.add(value)
        integer.add(node)
        if self._is_fused(node):
            # What it is fused to has no result of its own.
            self.needed.pop(operands(node)[0], None)
        self.needed[node] = None

    def _is_fused(self, node: Node) -> bool:
        """Returns True for an activation that the operation before computes on the way."""
        if kind(node) not in self.form.fused:
            return False
        before = operands(node)[0]
        alone = len(before.users) == 1
        product = kind(before) in PRODUCTS and kind(before.args[1]) == STORED
        return alone and (product or kind(before) in ("aten.add.Tensor",))

    def _source(self, value: Node) -> Node:
        """Returns the tensor that a value is moved from."""
        while self.form.moves_values(kind(value)):
            value = operands(value)[0]
        return value

    def _asked(self, node: Node) -> Iterator[Grid]:
        """Yields the grids that readers of a tensor want."""
        for user in node.users:
            if kind(user) == QUANTIZE:
                yield grid_of(user)
            elif self.form.moves_values(kind(user)):
                yield from self._asked(user)

    def put(self, found: Mapping[Node, Grid]) -> None:
        """Puts quantize and dequantize nodes into the graph.

        Args:
            found: grids of what was missing.
        """
        self.grids.update(found)
        for node in self.needed:
            self._put(node, self.grids[node])
        self._move_codes()
        self._join()
        if self.form.loses_roundings:
            _keep_roundings(self.module)
        _one_reader_each(self.module)
        _drop_clamps(self.module)

    def _put(self, node: Node, grid: Grid) -> None:
        readers = list(node.users)
        with self.module.graph.inserting_after(node):
            codes = quantize(self.module, node, grid)
        for reader in readers:
            if kind(reader) == QUANTIZE and grid_of(reader) == grid:
                reader.replace_all_uses_with(codes)
                self.module.graph.erase_node(reader)
                continue
            with self.module.graph.inserting_before(reader):
                reader.replace_input_with(node, dequantize(self.module, codes))

    def _move_codes(self) -> None:
        """Rounds what is moved from a grid on that grid again, which changes nothing, so that integers are moved."""
        for node in list(self.module.graph.nodes):
            if self.form.moves_values(kind(node)) and kind(operands(node)[0]) == DEQUANTIZE and node in self._read:
                readers = [user for user in node.users if not self.form.moves_values(kind(user))]
                grid = grid_of(operands(node)[0])
                if all(kind(user) == QUANTIZE and grid_of(user) == grid for user in node.users):
                    continue
                self._put(node, grid) if readers or node.users else None

    def _join(self) -> None:
        """Gives what is concatenated the grid of the whole: runtimes only copy there."""
        for node in list(self.module.graph.nodes):
            if kind(node) != _JOIN or node not in self.needed:
                continue
            grid = self.grids[node]
            for value in operands(node):
                if grid_of(value) != grid:
                    with self.module.graph.inserting_before(node):
                        codes = quantize(self.module, value, grid)
                        node.replace_input_with(value, dequantize(self.module, codes))


def _keep_roundings(module: GraphModule) -> None:
    """Puts a product with 1 between two roundings in a row to different grids; its integer kernel rounds once."""
    for node in list(module.graph.nodes):
        if kind(node) != QUANTIZE or kind(node.args[0]) != DEQUANTIZE or grid_of(node.args[0]) == grid_of(node):
            continue
        value = node.args[0]
        with module.graph.inserting_before(node):
            one = put_constant(module, "one", torch.ones([1] * value.meta["val"].ndim))
            factor = dequantize(module, quantize(module, one, _ONE))
            product = module.graph.call_function(torch.ops.aten.mul.Tensor, (value, factor))
        product.meta.update(value.meta)
        node.args = (product, *node.args[1:])


def _one_reader_each(module: GraphModule) -> None:
    """Gives each reader a dequantize node of its own: runtimes look for pairs of them with one operation."""
    for node in list(module.graph.nodes):
        if kind(node) != DEQUANTIZE:
            continue
        codes = node.args[0]
        for reader in list(node.users)[1:]:
            with module.graph.inserting_before(reader):
                reader.replace_input_with(node, dequantize(module, codes))


def _drop_clamps(module: GraphModule) -> None:
    """Removes activations that clip to the range of the grid that alone reads them: rounding also clips there."""
    for node in list(module.graph.nodes):
        readers = list(node.users)
        if kind(node) not in _CLAMPS or len(readers) != 1 or kind(readers[0]) != QUANTIZE:
            continue
        low, high = _bounds(node)
        grid = grid_of(readers[0])
        if grid.code(low) <= LOW and grid.code(high) >= HIGH:
            node.replace_all_uses_with(operands(node)[0])
            module.graph.erase_node(node)


def _bounds(node: Node) -> tuple[float, float]:
    """Returns the lowest and the highest value that an activation lets through."""
    given: list[Any] = list(node.args[1:])
    both = [*given, *_CLAMPS[kind(node)][len(given) :]]
    low, high = both[0], both[1]
    return -math.inf if low is None else low, math.inf if high is None else high
