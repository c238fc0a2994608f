"""The product of a quantized layer that keeps its input for the backward pass, and rounds it again there.

What made the input (a ReLU, an addition in front of it) keeps the same tensor for its own backward pass, or the next
layer does: so nothing is kept that float training does not keep, but for one bit an element, of what was not clipped.
Autograd by itself would keep the rounded input as well, half as much again in a network of convolutions, normalizations
and activation functions. To round takes as long as to write a gradient where it is masked, and that is saved: the
product's gradient belongs to nobody else, and is masked in place.

It serves inputs that have the dtype of the product. Of a float32 input under autocast the rounded copy is the smaller
one, and autograd keeps that.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lq_plugin.functional.affine import fake_quantize
from lq_plugin.functional.affine_kernels import masked_gradient
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.product import Convolution, product, product_gradients
from lq_plugin.native.layouts import Layout
from lq_plugin.native.ops import kernels_for, laid_out
from lq_plugin.native.switch import FakeQuantizeKernels
from lq_plugin.native.workspace import workspace_like
from lq_plugin.quantizers import ActivationQuantizer


class _Rounding(NamedTuple):
    """Rounding of an input.

    Args:
        scale, zero_point: float32 `[1]`, copies: ranges move on once the batch is over.
        grid: the integer levels.
        extremes: float32 `[1]` each, which take in those of the input, in place.
        kernels: that round.
    """

    scale: Tensor
    zero_point: Tensor
    grid: IntegerGrid
    extremes: tuple[Tensor, Tensor] | None
    kernels: FakeQuantizeKernels

    def once(self, x: Tensor, masked: bool) -> tuple[Tensor, Tensor | None]:
        """Returns rounded `x`, in a workspace, and the mask, where one is wanted, and takes in the extremes."""
        qparams, bounds, out = (
            (self.scale, self.zero_point),
            (self.grid.quant_min, self.grid.quant_max),
            workspace_like(x),
        )
        if self.extremes is None:
            return self.kernels.fake_quantize(x, *qparams, bounds, _whole(x), masked, out=out)
        return self.kernels.fake_quantize_observed(x, *qparams, bounds, *self.extremes, masked, out=out)

    def again(self, x: Tensor) -> Tensor:
        """Returns rounded `x`: with its gradient where gradients are on, else in a workspace."""
        if torch.is_grad_enabled() or kernels_for(x) is not self.kernels:
            return fake_quantize(x, self.scale, self.zero_point, self.grid)
        bounds, out = (self.grid.quant_min, self.grid.quant_max), workspace_like(x)
        return self.kernels.fake_quantize(x, self.scale, self.zero_point, bounds, _whole(x), False, out=out)[0]


class _Product(torch.autograd.Function):
    """Apply to `(x, weight, bias, rounding, convolution)`; `convolution` is None for a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, rounding: Any, convolution: Any) -> Any:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        y, mask = rounding.once(x, needs_x)
        ctx.save_for_backward(x if needs_weight else None, mask, weight if needs_x else None)
        ctx.rounding, ctx.convolution = rounding, convolution
        ctx.shapes = x.shape, x.stride(), weight.shape
        return product(y, weight, bias, convolution)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mask, weight = ctx.saved_tensors
        shape, strides, weight_shape = ctx.shapes
        # What is not wanted is not read: only its shape is.
        y = grad.new_empty(shape) if x is None else ctx.rounding.again(x)
        weight = grad.new_empty(weight_shape) if weight is None else weight
        inside, *others = product_gradients(grad, y, weight, ctx.convolution, ctx.needs_input_grad[:3])
        if inside is not None:
            if torch.is_grad_enabled() or type(inside) is not Tensor:
                inside = masked_gradient(inside, mask, _whole(inside), strides, ctx.rounding.kernels)
            else:
                inside = laid_out(inside, strides)
                ctx.rounding.kernels.keep(inside, mask, _whole(inside))
        return inside, *others, None, None


def _whole(x: Tensor) -> Layout:
    return Layout(1, 1, x.numel(), 1)


def product_of_kept_input(layer: QuantizedLayer, x: Tensor) -> Tensor | None:
    """Returns a layer's output before its output quantizer; None: autograd is to keep what it keeps.

    Of a layer whose class says that it computes the product of both operands alone (`is_plain_product`). The
    numbers and gradients are those of the product of `quantized_input` and `quantized_weight`.

    Args:
        layer: a linear layer or a convolution.
        x: its input.
    """
    inputs = layer.input_quantizer
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(inputs, ActivationQuantizer):
        return None
    # Of what is no tensor, the float layer says what is wrong.
    if torch._C._len_torch_function_stack() or not type(layer).is_plain_product or not isinstance(x, Tensor):
        return None
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return None
    shared = layer._shared_input is not None and layer._shared_input.takes(x)
    if shared or "_conv_forward" in vars(layer) or not inputs.rounds_plainly(x):
        return None
    kernels = kernels_for(x, qparams=(inputs.scale, inputs.zero_point))
    if kernels is None:
        return None
    convolution = None
    if isinstance(layer, nn.modules.conv._ConvNd):
        convolution = _geometry(layer, x)
        if convolution is None:
            return None
    # Asked for once: a parametrization computes it anew each time.
    weight, bias = layer.quantized_weight(), cast(Any, layer).bias
    if torch.is_autocast_enabled(device):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype != x.dtype:
        return product(layer.quantized_input(x), weight, bias, convolution)
    qparams = inputs.scale.detach().clone(), inputs.zero_point.detach().clone()
    rounding = _Rounding(*qparams, inputs.spec.grid, inputs.watched_extremes(), kernels)
    y: Tensor = _Product.apply(x, weight, bias, rounding, convolution)
    return y


def _geometry(layer: nn.modules.conv._ConvNd, x: Tensor) -> Convolution | None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.ndim != len(layer.kernel_size) + 2:
        return None
    return Convolution(list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
