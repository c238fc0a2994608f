"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import ClassVar

from torch import Tensor, nn

from lq_plugin.layers.base import Operation, ShadowedForward, scales_output
from lq_plugin.layers.product_layer import QuantizedProduct
from lq_plugin.layers.registry import register_layer


class _QuantizedConv(QuantizedProduct):
    """y = Q(W) ∗ Q(x) + b. `input_axis` is counted from the end, so that unbatched inputs work also.

    Input `[N, C_in, *spatial]` or `[C_in, *spatial]`, weight `[C_out, C_in / groups, *kernel]`.
    """

    operation: ClassVar[Operation | None] = "convolution"
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def channels(self) -> tuple[int, int]:
        return self.in_channels, self.out_channels

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def output_scale(self, x: Tensor) -> Tensor | None:
        if not scales_output(self.input_quantizer):
            return None
        box = x.new_full((1, 1, *self.kernel_size), 1.0 / prod(self.kernel_size))
        return self._conv_forward(x.abs().mean(type(self).input_axis, keepdim=True), box, None)


@register_layer(nn.Conv1d)
class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    float_class = nn.Conv1d
    input_axis = -2
    is_plain_product = True


@register_layer(nn.Conv2d)
class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    float_class = nn.Conv2d
    input_axis = -3
    has_integer_kernel = is_plain_product = True


@register_layer(nn.Conv3d)
class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    float_class = nn.Conv3d
    input_axis = -4
    is_plain_product = True


class QuantizedConvTranspose(ShadowedForward, _QuantizedConv):
    """Transposed convolution; the weight `[C_in, C_out / groups, *kernel]` is put in the order of a convolution's."""

    operation = "transposed convolution"
    groups: int

    def canonical(self, weight: Tensor) -> Tensor:
        c_in, per_group, *kernel = weight.shape
        grouped = weight.reshape(self.groups, c_in // self.groups, per_group, *kernel)
        return grouped.transpose(1, 2).reshape(self.groups * per_group, c_in // self.groups, *kernel)

    def from_canonical(self, weight: Tensor) -> Tensor:
        c_out, per_group, *kernel = weight.shape
        grouped = weight.reshape(self.groups, c_out // self.groups, per_group, *kernel)
        return grouped.transpose(1, 2).reshape(self.groups * per_group, c_out // self.groups, *kernel)


@register_layer(nn.ConvTranspose1d)
class QuantizedConvTranspose1d(QuantizedConvTranspose, nn.ConvTranspose1d):
    float_class = nn.ConvTranspose1d
    input_axis = -2


@register_layer(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(QuantizedConvTranspose, nn.ConvTranspose2d):
    float_class = nn.ConvTranspose2d
    input_axis = -3


@register_layer(nn.ConvTranspose3d)
class QuantizedConvTranspose3d(QuantizedConvTranspose, nn.ConvTranspose3d):
    float_class = nn.ConvTranspose3d
    input_axis = -4
