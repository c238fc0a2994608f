"""Bilinear layers: a product of two inputs and a weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.intent.formats import SLOTS
from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.registry import register_layer


@register_layer(nn.Bilinear)
class QuantizedBilinear(QuantizedLayer, nn.Bilinear):
    """y = Q(x₁)ᵀ Q(W) Q(x₂) + b. Weight `[C_out, C_in1, C_in2]`; one range serves both inputs."""

    float_class = nn.Bilinear
    added_slots = SLOTS

    def channels(self) -> tuple[int, int]:
        return self.in1_features, self.out_features

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        first, second = self.quantized_input(input1), self.quantized_input(input2)
        return self.quantized_output(F.bilinear(first, second, self.quantized_weight(), self.bias))
