"""XNOR-Net: binary weights with a scale for each filter (BWN), and binary inputs scaled at the output (XNOR).

For a filter W of n elements, α = ‖W‖₁ / n minimizes ‖W - α·B‖² with B = sign(W):

    W̃ = α · sign(W)

Backward, two choices (g = ∂C/∂W̃):

    plain   ∂C/∂W = g · 1{|W| ≤ 1}                      straight through; α is a constant
    paper   ∂C/∂W = g · (1 / n + α · 1{|W| < 1})        section 3.1

Inputs: I ∗ W ≈ (sign(I) ∗ sign(W)) ⊙ K·α, where K holds, for each output pixel, the mean magnitude of the window
it sees: K = A ∗ box / (w·h), A = mean over channels of |I| (eq. 11). The authors' released code leaves K out.

Reference: Rastegari et al., "XNOR-Net", ECCV 2016 (arXiv 1603.05279), eqs. 5 and 6 for α.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.binary_connect import LATENT_BOUND, hard_tanh_gradient, plain_sign
from lq_plugin.functional.grouping import reduced_dims
from lq_plugin.functional.transforms import applied


def filter_scale(weight: Tensor, scale_shape: tuple[int, ...], count: Tensor | int | None = None) -> Tensor:
    """Returns α, the mean |W| of the elements that share a scale.

    Args:
        weight: blocks of a weight (`lq_plugin.functional.grouping`).
        scale_shape: shape of the scales; dims of size 1 are averaged over.
        count: elements that share each scale, where some of the blocks are padding.

    >>> filter_scale(torch.tensor([[1.0, -3.0], [0.5, 0.5]]), (2, 1))
    tensor([[2.0000],
            [0.5000]])
    """
    total = weight.detach().float().abs().sum(reduced_dims(scale_shape), keepdim=True)
    return total / (weight.numel() // total.numel() if count is None else count)


def binary_weight(weight: Tensor, scale: Tensor, paper_gradient: bool = False) -> Tensor:
    """Returns α · sign(W).

    Args:
        weight: float tensor.
        scale: α, broadcastable to it.
        paper_gradient: the gradient of section 3.1 instead of the plain one.
    """
    y: Tensor = applied(_BinaryWeight, weight, scale, paper_gradient)
    return y


class _BinaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, paper_gradient: Any) -> Any:
        ctx.save_for_backward(weight, scale)
        ctx.paper_gradient = paper_gradient
        return plain_sign(weight.float()).mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        if not ctx.paper_gradient:
            return hard_tanh_gradient(grad, weight), None, None
        elements = weight.numel() // scale.numel()
        factor = 1.0 / elements + scale * (weight.abs() < LATENT_BOUND)
        return (grad * factor).to(grad.dtype), None, None
