"""Base of linear layers and convolutions: the product of a quantized input and a quantized weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.integer.forward import integer_forward
from lq_plugin.layers.kept_input import product_of_kept_input


class QuantizedProduct(QuantizedLayer):
    """y = Q(W) · Q(x) + b, by integers where the layer is switched to them; times K where XNOR-Net's inputs need it."""

    has_output_scale = True

    #: Computes what the float class does of input, weight and bias.
    _multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if self._integer_state is not None and (y := integer_forward(self, input)) is not None:
            return self.quantized_output(y)
        bias: Tensor | None = cast(Any, self).bias
        scale = self.output_scale(input) if self._scales_output else None
        if scale is not None:
            y = self._multiply(self.quantized_input(input), self.quantized_weight(), None) * scale
            y = y if bias is None else y + bias.view(-1, *[1] * (-type(self).input_axis - 1))
        elif (y := product_of_kept_input(self, input)) is None:
            y = self._multiply(self.quantized_input(input), self.quantized_weight(), bias)
        return self.quantized_output(y)
