"""Linear layers: `nn.Linear`, and `Conv1D` of Hugging Face transformers (a Linear with its weight transposed)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.layers.base import QuantizedLayer, scales_output
from lq_plugin.layers.integer.forward import integer_forward
from lq_plugin.layers.kept_input import product_of_kept_input
from lq_plugin.layers.parametrized import weight_of
from lq_plugin.layers.registry import register_layer, register_layer_name


@register_layer(nn.Linear)
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """y = Q(x) · Q(W)ᵀ + b. Input `[..., C_in]`."""

    float_class = nn.Linear
    operation = "product"
    has_output_scale = True
    has_integer_kernel = True

    def channels(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def casts_operands(self) -> bool:
        return type(self).forward is QuantizedLinear.forward

    def forward(self, input: Tensor) -> Tensor:
        if self._integer_state is not None and (y := integer_forward(self, input)) is not None:
            return self.quantized_output(y)
        scale = self.output_scale(input) if self._scales_output else None
        if scale is None:
            kept = product_of_kept_input(self, input)
            if kept is None:
                kept = F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)
            return self.quantized_output(kept)
        y = F.linear(self.quantized_input(input), self.quantized_weight()) * scale
        return self.quantized_output(y if self.bias is None else y + self.bias)

    def output_scale(self, x: Tensor) -> Tensor | None:
        return x.abs().mean(-1, keepdim=True) if scales_output(self.input_quantizer) else None


@register_layer_name("transformers.pytorch_utils.Conv1D")
class QuantizedConv1D(QuantizedLayer):
    """GPT-2's linear layer: its weight is `[C_in, C_out]`."""

    operation = "product"

    def channels(self) -> tuple[int, int]:
        c_in, c_out = weight_of(self).shape
        return c_in, c_out

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_canonical(self, weight: Tensor) -> Tensor:
        return weight.t()


@register_layer_name("torch_geometric.nn.dense.linear.Linear")
class QuantizedGraphLinear(QuantizedLayer):
    """torch_geometric's linear layer: no `nn.Linear`, with its weight `[C_out, C_in]`."""

    operation = "product"

    def channels(self) -> tuple[int, int]:
        c_out, c_in = weight_of(self).shape
        return c_in, c_out
