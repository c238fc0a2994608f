"""Compiled kernels (`lq_plugin.native`) for formats whose scales follow from the values, in one pass over memory.

A rule describes the torch operations of a format: those of `lq_plugin.functional.mx`, `ocp_mx`, `nvfp4` and
`vs_quant`, bit for bit. Blocks lie along the channels, in whatever order the dims have in memory: nothing is moved,
padded or copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional import mx, nvfp4, ocp_mx
from lq_plugin.functional.affine_kernels import masked_gradient
from lq_plugin.functional.minifloat import E2M1, Minifloat
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import ops
from lq_plugin.native.kernels import BlockRule, Kernels
from lq_plugin.native.layouts import block_layout


@functools.cache
def mx_rule(mantissa_bits: int) -> BlockRule:
    """Returns the rule of MX4, MX6 and MX9, for what `mx_step` and `fake_quantize` compute."""
    limit = 2**mantissa_bits - 1
    return BlockRule(
        family=BlockRule.MICROEXPONENTS,
        block=mx.BLOCK,
        quant_min=-limit,
        quant_max=limit,
        mantissa_bits=mantissa_bits,
        scale_bits=mx.MICRO_BITS,
    )


@functools.cache
def ocp_rule(element: Minifloat, mode: ocp_mx.ScaleMode) -> BlockRule:
    """Returns the rule of OCP MX, for what `fake_quantize_mx` computes."""
    return _float_rule(BlockRule.OCP, ocp_mx.BLOCK, element, ocp_mx.MODES.index(mode), 1.0)


def nvfp4_rule(tensor_scale: float, target: nvfp4.Target = "max") -> BlockRule:
    """Returns the rule of NVFP4, for what `fake_quantize_nvfp4` computes with this scale g of the tensor."""
    return _float_rule(BlockRule.NVFP4, nvfp4.BLOCK, E2M1, nvfp4.TARGETS.index(target), tensor_scale)


def vector_rule(size: int, grid: IntegerGrid, scale_bits: int, coarse: float) -> BlockRule:
    """Returns the rule of VS-Quant for activations: integer scales of vectors under one float scale.

    Args:
        size: channels of a vector.
        grid: the integer levels.
        scale_bits: bits of the integer scales.
        coarse: γ, the float scale.
    """
    return BlockRule(
        family=BlockRule.VECTORS,
        block=size,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        scale_bits=scale_bits,
        coarse=coarse,
    )


def _float_rule(family: int, block: int, element: Minifloat, mode: int, coarse: float) -> BlockRule:
    return BlockRule(
        family=family,
        block=block,
        mantissa_bits=element.mantissa_bits,
        min_exponent=element.min_exponent,
        max_exponent=element.max_exponent,
        max_value=element.max_value,
        mode=mode,
        coarse=coarse,
    )


def fake_quantize_blocks(
    x: Tensor, axis: int, rule: Callable[[], BlockRule | None], dtype: torch.dtype | None = None
) -> Tensor | None:
    """Returns `x` fake-quantized in blocks, with the straight-through gradient of its format.

    Args:
        x: float tensor of any shape.
        axis: of the channels; the last block may be shorter.
        rule: makes the rule; called only if the kernels are used. None: they do not have the format.
        dtype: of the result, if not that of `x`; see `lq_plugin.functional.affine.fake_quantize`.

    Returns:
        Tensor like `x`, laid out in memory as it is; None where the kernels cannot be used, and torch operations are to
        do it.

    >>> from lq_plugin.native import use_native
    >>> with use_native(False):
    ...     fake_quantize_blocks(torch.ones(1, 16), 1, lambda: mx_rule(4)) is None
    True
    """
    if torch.compiler.is_compiling() or not isinstance(kernels := ops.kernels_for(x, dtype), Kernels):
        return None
    made = rule()
    layout = None if made is None else block_layout(x, axis, made.block)
    if made is None or layout is None:
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor | None = _FakeQuantizeBlocks.apply(x, layout, made, kernels, dtype)
        return found
    return kernels.fake_quantize_blocks(x, layout, made, masked=False, dtype=dtype)[0]


class _FakeQuantizeBlocks(torch.autograd.Function):
    """Fake quantization in blocks; one bit per element is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Any, rule: Any, kernels: Any, dtype: Any) -> Any:
        y, mask = kernels.fake_quantize_blocks(x, layout, rule, masked=True, dtype=dtype)
        ctx.save_for_backward(mask)
        ctx.of = layout.mask, x.stride(), kernels, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return masked_gradient(grad, mask, *ctx.of), *(None,) * 4
