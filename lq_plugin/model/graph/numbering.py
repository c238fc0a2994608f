"""Names for the operations inside one call of a module: `add_0`, `matmul_1`, ...

A name must be the same in training, in evaluation and under `torch.compile`, and must not depend on what other modules
do. So it counts, within one call of a module, the operations of its kind in which activations meet, and an activation
is every floating-point tensor but the module's own constants: parameters, buffers, and what it makes of these and of
nothing (`torch.arange`, `torch.randn_like(x)`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lq_plugin.layers import WeightInUse
from lq_plugin.model.graph.macs import PRODUCTS
from lq_plugin.model.graph.op_names import ELEMENTWISE, UNARY

#: Operations whose operands can be quantized.
OPERATIONS = PRODUCTS | ELEMENTWISE | UNARY | {"cat"}
#: torch's kernel of an attention.
ATTENTION = "scaled_dot_product_attention"
#: Of its tensors those that a cache keeps, by the word that rules have for them.
CACHED = {"keys": 1, "values": 2}
#: Products that are added to the first of their tensors.
_ADDED = ("addmm", "baddbmm", "addmv", "addbmm")
#: How many of the first tensors an operation gets are operands of it; two where it is not listed. The others are masks
#: and biases.
_OPERANDS = {
    "bilinear": 3,
    **dict.fromkeys(("scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"), 3),
    **dict.fromkeys(_ADDED, 3),
    **dict.fromkeys(UNARY, 1),
    **dict.fromkeys(("cat", "einsum", "multi_dot"), 10**6),
}


def product_factors(op: str, count: int) -> range:
    """Returns the indices of the tensors that a product multiplies, of the `count` that it gets.

    What it adds or masks with is no factor.
    """
    return range(1 if op in _ADDED else 0, min(count, _OPERANDS.get(op, 2)))


def part_of(name: str, part: str) -> str:
    """Returns the name that rules have for the `keys`, `values` or `probabilities` of an attention kernel.

    >>> part_of("block.scaled_dot_product_attention_0", "probabilities")
    'block.probabilities_0'
    """
    owner, dot, label = name.rpartition(".")
    return f"{owner}{dot}{part}_{label.rpartition('_')[2]}"


class Numbering:
    """Counts the operations of one call of `module`, or of what runs outside of every module."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.counts: dict[str, int] = {}
        self.constants: list[Tensor] = []
        if module is not None:
            self.constants = [buffer for buffer in module._buffers.values() if buffer is not None]

    def activations(self, inputs: Sequence[Tensor]) -> list[bool]:
        """Returns those of the tensors that are floating-point activations."""
        return [tensor.is_floating_point() and not self._is_constant(tensor) for tensor in inputs]

    def label(self, op: str, inputs: Sequence[Tensor]) -> tuple[str, tuple[int, ...]] | None:
        """Returns the name of the operation that is about to run, and its operands; None where no activations meet.

        Args:
            op: its bare name, see `op_names.normalize`.
            inputs: all tensors that it gets, in order.
        """
        if op not in OPERATIONS:
            return None
        real = self.activations(inputs)
        if op in ELEMENTWISE:
            counts = len(real) > 1 and all(real[:2]) and max(inputs[0].dim(), inputs[1].dim()) > 0
        else:
            counts = sum(real) > (op == "cat")
        if not counts:
            return None
        return self.next(op), tuple(index for index, is_real in enumerate(real[: _OPERANDS.get(op, 2)]) if is_real)

    def next(self, label: str) -> str:
        """`label` with its number."""
        number = self.counts.get(label, 0)
        self.counts[label] = number + 1
        return f"{label}_{number}"

    def note(self, op: str, in_place: bool, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Learns from a call that has run which tensors are constants.

        Args:
            op: name of the call.
            in_place: it writes into its first input.
            inputs, outputs: its tensors.
        """
        made_of_constants = (
            op.startswith("new_") or op.endswith("_like") or all(self._is_constant(tensor) for tensor in inputs)
        )
        if made_of_constants:
            self.constants += [tensor for tensor in outputs if not self._is_constant(tensor)]
        elif in_place and inputs and self._is_constant(inputs[0]):
            self.constants = [tensor for tensor in self.constants if tensor is not inputs[0]]

    def _is_constant(self, tensor: Tensor) -> bool:
        return isinstance(tensor, (nn.Parameter, WeightInUse)) or any(tensor is constant for constant in self.constants)


def channel_axis(op: str, index: int) -> int:
    """The axis of operand `index` that a product sums over; -1 where it sums over none, or over any."""
    if op.startswith("conv") and op.endswith("d"):
        spatial = int(op[-2])
        return -(spatial + 1) - (index if "transpose" in op else 0)
    if op == "convolution":
        return 1  # it takes any number of spatial dims
    second = dict.fromkeys(("matmul", "mm", "bmm", "grouped_mm", "conv_tbc"), 1)
    second |= dict.fromkeys(("addmm", "baddbmm", "addbmm", "scaled_dot_product_attention", "flex_attention"), 2)
    return -2 if second.get(op) == index else -1
