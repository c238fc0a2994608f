"""Linear layers: `nn.Linear`, and `Conv1D` of Hugging Face transformers (a Linear with its weight transposed)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.layers.base import QuantizedLayer, scales_output
from lq_plugin.layers.parametrized import weight_of
from lq_plugin.layers.product_layer import QuantizedProduct
from lq_plugin.layers.registry import register_layer, register_layer_name


@register_layer(nn.Linear)
class QuantizedLinear(QuantizedProduct, nn.Linear):
    """y = Q(x) · Q(W)ᵀ + b. Input `[..., C_in]`."""

    float_class = nn.Linear
    operation = "product"
    has_integer_kernel = is_plain_product = True
    _multiply = staticmethod(F.linear)

    def channels(self) -> tuple[int, int]:
        return self.in_features, self.out_features

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
