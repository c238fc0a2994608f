"""Linear and 2-d convolution with integer sums, and the gradient of the fake-quantized operation.

Forward:  y = s_x · s_w · Σ (q_x - z_x) · q_w + b, summed exactly (Jacob et al., CVPR 2018, equation 7): on CPUs by
oneDNN's products of
uint8 and int8, on GPUs by Triton's of int8; it is that of fake quantization up to the order of float sums.

Backward: the straight-through one of fake quantization, from what the forward pass kept: q_x (a byte an element), one
bit an element for what was not clipped, and q_w.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.layers.product import Convolution, product_gradients
from lq_plugin.native.ops import laid_out


class Levels(NamedTuple):
    """An input as integers.

    Args:
        q: its levels above the smallest, uint8; on a GPU less 128, int8.
        mask: a bit for each element that was not clipped; None: no gradient is wanted.
        scale, zero_point: of `q`; on a GPU float32 tensors `[1]`, for to read them would wait.
    """

    q: Tensor
    mask: Tensor | None
    scale: float | Tensor
    zero_point: int | Tensor


class Operands(NamedTuple):
    """An input and a weight as integers.

    Args:
        levels: of the input.
        q_weight: int8.
        weight_scale: float32, `[C_out]` or `[1]`.
        clip: the weight's grid, where elements of it can be clipped.
        weight_sums: of `q_weight` for each output, where the product takes them.
    """

    levels: Levels
    q_weight: Tensor
    weight_scale: Tensor
    clip: IntegerGrid | None
    weight_sums: Tensor | None = None


class IntegerProduct(torch.autograd.Function):
    """Apply to `(x, weight, bias, operands, convolution, arithmetic)`; `convolution` is None for a linear layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, operands: Any, convolution: Any, arithmetic: Any
    ) -> Any:
        q, mask, ctx.scale, ctx.zero_point = operands.levels
        ctx.save_for_backward(q, mask, operands.q_weight, operands.weight_scale, weight if operands.clip else None)
        ctx.clip = operands.clip
        ctx.convolution, ctx.arithmetic = convolution, arithmetic
        # Gradients of a channels-last convolution lie otherwise than the input did: the mask's bits are in the order of
        # the latter.
        ctx.strides = x.stride()
        autocast = torch.is_autocast_enabled(x.device.type)
        return arithmetic.product(
            operands, bias, convolution, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, mask, q_weight, weight_scale, weight = ctx.saved_tensors
        arithmetic = ctx.arithmetic
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # In the gradient's dtype, as autocast would have cast them.
        x = arithmetic.dequantize(q, ctx.scale, ctx.zero_point, grad.dtype) if needs_weight else None
        shape = [-1, *[1] * (q_weight.ndim - 1)]
        w = q_weight.float().mul_(weight_scale.view(shape)).to(grad.dtype) if needs_x else None
        # What is not wanted is not read: only its shape is.
        x = torch.empty_strided(q.shape, q.stride(), dtype=grad.dtype, device=q.device) if x is None else x
        w = torch.empty_like(q_weight, dtype=grad.dtype) if w is None else w
        x_grad, weight_grad, bias_grad = product_gradients(
            grad, x, w, ctx.convolution, (needs_x, needs_weight, needs_bias)
        )
        if x_grad is not None:
            x_grad = laid_out(x_grad, ctx.strides)
            arithmetic.keep(x_grad, mask)
        if weight_grad is not None and ctx.clip is not None:
            r = (weight.detach() * weight_scale.view(shape).reciprocal()).round_()
            weight_grad.masked_fill_((r < ctx.clip.quant_min).logical_or_(r > ctx.clip.quant_max), 0.0)
        return x_grad, weight_grad, bias_grad, None, None, None


def onednn_product(
    operands: Operands, bias: Tensor | None, convolution: Convolution | None, dtype: torch.dtype
) -> Tensor:
    """Returns the product on a CPU, rounded once to `dtype`.

    Args:
        operands: integers of input and weight.
        bias: float.
        convolution: its geometry; None: a linear layer.
        dtype: float32, bfloat16 or float16.
    """
    (q, _, scale, zero_point), q_weight, scales = operands.levels, operands.q_weight, operands.weight_scale
    none = torch.zeros(scales.shape, dtype=torch.int32, device=scales.device)
    after: tuple[Any, ...] = (1.0, 0, dtype, "none", [], "")
    bias = None if bias is None else bias.detach().float()
    if convolution is None:
        packed = torch.ops.onednn.qlinear_prepack(q_weight, list(q.shape))
        y: Tensor = torch.ops.onednn.qlinear_pointwise(q, scale, zero_point, packed, scales, none, bias, *after)
        return y
    packed = torch.ops.onednn.qconv_prepack(q_weight, scales, scale, zero_point, *convolution, list(q.shape))
    # oneDNN computes in float32 and, without FP16 instructions, has no convolution that writes float16.
    after = (1.0, 0, torch.float32 if dtype == torch.float16 else dtype, "none", [], "")
    y = torch.ops.onednn.qconv2d_pointwise(q, scale, zero_point, packed, scales, none, bias, *convolution, *after)
    return y.to(dtype)
