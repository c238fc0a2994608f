"""BinaryConnect and BNN: -1 and +1 without a scale.

    deterministic   b = +1 where x ≥ 0, else -1                 (sign(0) = +1: there are two levels, not three)
    stochastic      b = +1 with probability σ(x), else -1,      σ(x) = clip((x + 1) / 2, 0, 1), the hard sigmoid

Backward (both):    ∂b/∂x = 1 where |x| ≤ 1, else 0             (BNN's hard-tanh gradient)

BinaryConnect passes the gradient on everywhere (`sign identity`) and keeps its weights in [-1, 1] by clipping them
after each update; inside that interval the two agree. `sign:t` has the deterministic threshold t in place of 0.

Reference: Courbariaux, Bengio, David, "BinaryConnect", NIPS 2015 (arXiv 1511.00363), eqs. 1-3;
Hubara et al., "Binarized Neural Networks", NIPS 2016 (arXiv 1602.02830), eqs. 1-4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.transforms import applied

#: Latent weights live in [-LATENT_BOUND, LATENT_BOUND]: beyond it they get no gradient.
LATENT_BOUND = 1.0


def hard_sigmoid(x: Tensor) -> Tensor:
    """Returns σ(x) = clip((x + 1) / 2, 0, 1), the probability of +1.

    >>> hard_sigmoid(torch.tensor([-2.0, 0.0, 0.5]))
    tensor([0.0000, 0.5000, 0.7500])
    """
    return ((x + 1) / 2).clamp(0, 1)


def sign(x: Tensor, noise: Tensor | None = None, threshold: float = 0.0, clipped: bool = True) -> Tensor:
    """Returns -1 and +1, with the straight-through gradient.

    Args:
        x: float tensor of any shape.
        noise: uniform in [0, 1), shaped like `x`, for stochastic binarization; None: deterministic.
        threshold: the smallest value whose deterministic sign is +1.
        clipped: the gradient is 0 where |x| > 1; False passes it on everywhere.

    Returns:
        Tensor like `x`.

    >>> sign(torch.tensor([-0.3, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """
    y: Tensor = applied(_Sign, x, noise, threshold, clipped)
    return y


def plain_sign(x: Tensor, threshold: float = 0.0) -> Tensor:
    """Returns -1 below the threshold and +1 from there on (sign(0) = +1), without a gradient.

    >>> plain_sign(torch.tensor([-0.0, 0.0]))
    tensor([1., 1.])
    """
    # 0 and 1 in x's own dtype: through booleans it takes five times as long on CPU.
    return torch.ge(x.detach(), threshold, out=torch.empty_like(x)).mul_(2).sub_(1)


def hard_tanh_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient where |x| ≤ 1, and 0 elsewhere.

    >>> hard_tanh_gradient(torch.ones(3), torch.tensor([-1.0, 0.5, 1.0001]))
    tensor([1., 1., 0.])
    """
    # One vectorised kernel for grad · 1{-a < x < a}, with a the first number above 1.
    beyond = LATENT_BOUND * (1 + torch.finfo(x.dtype).eps)
    y: Tensor = torch.ops.aten.hardtanh_backward(grad, x, -beyond, beyond)
    return y


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Any, threshold: Any, clipped: Any) -> Any:
        ctx.clipped = clipped
        if clipped:
            ctx.save_for_backward(x)
        return plain_sign(x if noise is None else hard_sigmoid(x) - noise, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return hard_tanh_gradient(grad, *ctx.saved_tensors) if ctx.clipped else grad, None, None, None
