"""Linear and 2-d convolution with integer sums, and the gradient of the fake-quantized operation.

Forward:  y = s_x · s_w · Σ (q_x - z_x) · q_w + b, summed exactly (Jacob et al., CVPR 2018, equation 7): on CPUs by oneDNN's products of
uint8 and int8, on GPUs by Triton's of int8; it is that of fake quantization up to the order of float sums.

Backward: the straight-through one of fake quantization, from what the forward pass kept: q_x (a byte an element), one bit an element
for what was not clipped, and q_w.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq_plugin.layers.integer.kernels import IntegerKernels
from lq_plugin.native.ops import laid_out
from lq_plugin.spec import IntegerGrid


class Convolution(NamedTuple):
    """How a 2-d convolution moves; padding is with zeros on both sides."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Operands(NamedTuple):
    """An input and a weight as integers.

    Args:
        q: the input's levels above the smallest, uint8; on a GPU less 128, int8.
        mask: a bit for each element that was not clipped; None: no gradient is wanted.
        scale, zero_point: of `q`; on a GPU float32 tensors `[1]`, for to read them would wait.
        q_weight: int8.
        weight_scale: float32, `[C_out]` or `[1]`.
        clip: the weight's grid, where elements of it can be clipped.
        weight_sums: of `q_weight` for each output, where the product takes them.
    """

    q: Tensor
    mask: Tensor | None
    scale: float | Tensor
    zero_point: int | Tensor
    q_weight: Tensor
    weight_scale: Tensor
    clip: IntegerGrid | None
    weight_sums: Tensor | None = None


class IntegerProduct(torch.autograd.Function):
    """Apply to `(x, weight, bias, operands, convolution, arithmetic)`; `convolution` is None for a linear layer."""

    @staticmethod
    def forward(ctx, x, weight, bias, operands, convolution, arithmetic):
        ctx.save_for_backward(operands.q, operands.mask, operands.q_weight, operands.weight_scale, weight if operands.clip else None)
        # Those tensors are saved, or were of use here alone.
        ctx.operands = operands._replace(q=None, mask=None, q_weight=None, weight_scale=None, weight_sums=None)
        ctx.convolution, ctx.arithmetic = convolution, arithmetic
        # Gradients of a channels-last convolution lie otherwise than the input did: the mask's bits are in the order of the latter.
        ctx.strides = x.stride()
        autocast = torch.is_autocast_enabled(x.device.type)
        return arithmetic.product(operands, bias, convolution, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, mask, q_weight, weight_scale, weight = ctx.saved_tensors
        operands, arithmetic = ctx.operands, ctx.arithmetic
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # In the gradient's dtype, as autocast would have cast them.
        x = arithmetic.dequantize(q, operands.scale, operands.zero_point, grad.dtype) if needs_weight else None
        shape = [-1, *[1] * (q_weight.ndim - 1)]
        w = q_weight.float().mul_(weight_scale.view(shape)).to(grad.dtype) if needs_x else None
        backward = _linear_backward if ctx.convolution is None else _convolution_backward
        x_grad, weight_grad, bias_grad = backward(grad, q, x, q_weight, w, ctx.convolution, (needs_x, needs_weight, needs_bias))
        if x_grad is not None:
            x_grad = laid_out(x_grad, ctx.strides)
            arithmetic.keep(x_grad, mask)
        if weight_grad is not None and operands.clip is not None:
            r = (weight.detach() * weight_scale.view(shape).reciprocal()).round_()
            weight_grad.masked_fill_((r < operands.clip.quant_min).logical_or_(r > operands.clip.quant_max), 0.0)
        return x_grad, weight_grad, bias_grad, None, None, None


def quantize_operands(
    x: Tensor,
    weight: Tensor,
    qparams: tuple[float, float, IntegerGrid],
    weight_qparams: tuple[Tensor, IntegerGrid, bool, bool],
    extremes: tuple[Tensor, Tensor] | None,
    kernels: IntegerKernels,
) -> Operands | None:
    """Both as integers.

    Args:
        x: input.
        weight: contiguous.
        qparams: scale, zero point and grid of the input.
        weight_qparams: scale and grid of the weight, whether the scale is to be found from its extremes, and whether elements can lie
            outside of the grid.
        extremes: see `IntegerKernels.quantize`.
        kernels: that quantize.

    Returns:
        None where one holds a NaN.
    """
    scale, zero_point, grid = qparams
    weight_scale, weight_grid, live, clips = weight_qparams
    q_weight = kernels.quantize_weight(weight.detach(), weight_scale, weight_grid, live)
    quantized = kernels.quantize(x.detach(), scale, zero_point, grid, x.requires_grad and torch.is_grad_enabled(), extremes)
    if q_weight is None or quantized is None:
        return None
    shifted = int(zero_point) - grid.quant_min
    return Operands(*quantized, scale, shifted, q_weight, weight_scale, weight_grid if clips else None)


def onednn_product(operands: Operands, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    """On a CPU, float32."""
    q, q_weight, scales = operands.q, operands.q_weight, operands.weight_scale
    none = torch.zeros(scales.shape, dtype=torch.int32)
    after: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    bias = None if bias is None else bias.detach()
    if convolution is None:
        packed = torch.ops.onednn.qlinear_prepack(q_weight, list(q.shape))
        return torch.ops.onednn.qlinear_pointwise(q, operands.scale, operands.zero_point, packed, scales, none, bias, *after)
    packed = torch.ops.onednn.qconv_prepack(q_weight, scales, operands.scale, operands.zero_point, *convolution, list(q.shape))
    return torch.ops.onednn.qconv2d_pointwise(
        q, operands.scale, operands.zero_point, packed, scales, none, bias, *convolution, *after
    )  # fmt: skip


def _convolution_backward(grad, q, x, q_weight, w, convolution, wanted):
    # What is not wanted is not read: only its shape is.
    x = torch.empty_strided(q.shape, q.stride(), dtype=grad.dtype, device=q.device) if x is None else x
    w = torch.empty_like(q_weight, dtype=grad.dtype) if w is None else w
    stride, padding, dilation, groups = convolution
    sizes = [q_weight.shape[0]] if wanted[2] else None
    return torch.ops.aten.convolution_backward(grad, x, w, sizes, stride, padding, dilation, False, [0, 0], groups, list(wanted))


def _linear_backward(grad, q, x, q_weight, w, convolution, wanted):
    rows = grad.reshape(-1, grad.shape[-1])
    x_grad = (rows @ w).view(q.shape) if wanted[0] else None
    weight_grad = rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None
    return x_grad, weight_grad, rows.sum(0) if wanted[2] else None
