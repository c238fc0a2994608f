"""Weights that a module's own code multiplies: experts as 3-D parameters, and 2-D parameters read by `F.linear` or `@`.

Which parameters these are is found in the module's code (`products_in_code`); the module's forward runs unchanged, with
aliases of the quantized weights in the place of the parameters (`weight_in_use`). To the plan each is a layer, called
as the parameter: `mlp.experts.gate_up_proj`. That of several experts is a stack of matrices `[out, in]`, one an expert:
scales are of each one's own. Their input has one range, of all tokens that are routed to any of them; an expert
without tokens moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lq_plugin.errors import ExportError, QuantizationError
from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.compound.base import (
    CompoundWeight,
    QuantizedCompound,
    compound_family,
    register_family,
)
from lq_plugin.layers.compound.inside import unchanged
from lq_plugin.layers.compound.products_in_code import products_in_code
from lq_plugin.layers.compound.routed_inputs import Experts, rows_of_experts
from lq_plugin.layers.compound.weight_in_use import Seen, WeightInUse, know_kernels
from lq_plugin.layers.registry import register_layer

_DIMS = (2, 3)


class UnseenExpertsError(QuantizationError):
    """Raised where the calls of a module's code do not tell which expert of a stack multiplies which rows."""


def _is_matrix(module: nn.Module, name: str) -> bool:
    """Returns whether an attribute is a parameter of floats, a matrix or a stack of them."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.dim() in _DIMS and parameter.is_floating_point()


def _exports() -> bool:
    """Returns whether torch.export runs the model (torch 2.6 does not tell)."""
    ask = getattr(torch.compiler, "is_exporting", None)
    return ask is not None and bool(ask())


class OwnWeight(CompoundWeight):
    """A weight `[out, in]`, or `[experts, out, in]`, that its module's own code multiplies.

    Args:
        owner: the module.
        key: the parameter's name.
        inputs_first: it is kept as `[..., in, out]`.
    """

    inputs_first: bool
    #: What is told of each product, see `watching`.
    _seen: Seen | None = None

    def __init__(self, owner: nn.Module, key: str, inputs_first: bool) -> None:
        super().__init__(owner, key)
        self.inputs_first = inputs_first
        know_kernels()

    @property
    def experts(self) -> int | None:
        """Number of matrices that it is a stack of; None for a single one."""
        return self.weight.shape[0] if self.weight.dim() == 3 else None

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return self.experts or 1

    @contextmanager
    def watching(self, see: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Shows what is multiplied while its module runs: the number of an expert, 0 of a single matrix, and its rows.

        Args:
            see: gets them, the rows `[rows, in]` as the input quantizer gives them.

        Raises:
            UnseenExpertsError: in the forward pass, where the code does not show which expert multiplies what.
        """

        def seen(x: Tensor, experts: Experts, offs: Tensor | None) -> None:
            if self.experts is None:
                see(0, x.reshape(-1, x.shape[-1]))
                return
            try:
                for expert, rows in rows_of_experts(x, experts, self.experts, offs):
                    see(expert, rows)
            except ValueError as error:
                raise UnseenExpertsError(f"{self.key}: {error}") from error

        self._seen = seen
        try:
            yield
        finally:
            self._seen = None

    def matrix_rows(self) -> int | None:
        """Output channels of each matrix of a stack; None for a single one."""
        return None if self.experts is None else self.weight.shape[2 if self.inputs_first else 1]


@register_layer(OwnWeight)
class QuantizedOwnWeight(QuantizedLayer, OwnWeight):
    """Q(W), with Q(x) before each product. The canonical weight has the rows of one expert after another."""

    float_class = OwnWeight
    slots = ("weight", "input")

    def channels(self) -> tuple[int, int]:
        out, inputs = self.weight.shape[-2:]
        return (out, inputs) if self.inputs_first else (inputs, out)

    def canonical(self, weight: Tensor) -> Tensor:
        turned = weight.transpose(-1, -2) if self.inputs_first else weight
        return turned.flatten(0, -2)

    def from_canonical(self, weight: Tensor) -> Tensor:
        inputs, out = QuantizedOwnWeight.channels(self)
        stacked = weight if self.experts is None else weight.view(-1, out, inputs)
        # As it is kept: other strides may be another kernel, and another order of summation.
        return stacked.transpose(-1, -2).contiguous() if self.inputs_first else stacked


@register_family
class OwnWeights(QuantizedCompound):
    """A module whose own code multiplies some of its parameters."""

    computes_inside = False
    input_names = ()
    remark = "no product in its code is seen to multiply these parameters"
    is_new = True

    @staticmethod
    def weights(module: nn.Module) -> list[CompoundWeight]:
        kind = getattr(type(module), "float_class", type(module))
        found = products_in_code(kind).items()
        return [OwnWeight(module, name, inputs_first) for name, inputs_first in found if _is_matrix(module, name)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = self._parts()
        if _exports() and any(part.input_quantizer is not None for part in parts.values()):
            raise ExportError(
                f"torch.export does not see the quantized inputs of {', '.join(parts)}, which the code of "
                f"{type(self).__name__} multiplies: leave them float (input='float'), or use torch.compile"
            )
        # A module that calls itself has its aliases already.
        before = {key: value for key, value in self.__dict__.items() if isinstance(value, WeightInUse)}
        held: list[str] = []
        try:
            for key, part in parts.items():
                self.__dict__[key] = WeightInUse.of(
                    part.quantized_weight(), key, part.quantized_input, cast(OwnWeight, part)._seen
                )
                held.append(key)
            if not torch.compiler.is_compiling():  # a recording sees what reads the others
                for key in products_in_code(type(self).float_class):
                    if key not in parts and _is_matrix(self, key):
                        self.__dict__[key] = WeightInUse.of(cast(Tensor, self._parameters[key]), key, unchanged)
                        held.append(key)
            return type(self).float_class.forward(self, *args, **kwargs)
        finally:
            for key in held:
                self.__dict__.pop(key, None)
            self.__dict__.update(before)


def own_weights(module: nn.Module) -> list[OwnWeight]:
    """Returns handles of the weights that a float module's own code multiplies; none for other modules."""
    if isinstance(module, QuantizedCompound) or compound_family(module) is not OwnWeights:
        return []
    return cast("list[OwnWeight]", OwnWeights.weights(module))
