"""The product of an input and a weight, of linear layers and convolutions, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Convolution(NamedTuple):
    """Geometry of a convolution; padding is with zeros on both sides."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def product(x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    """Returns what the float layer computes of these.

    Args:
        x: `[..., in]`, of a convolution `[N, in, *spatial]`.
        weight: `[out, in]`, of a convolution `[out, in / groups, *kernel]`.
        bias: `[out]`.
        convolution: its geometry; None: a linear layer.
    """
    if convolution is None:
        return F.linear(x, weight, bias)
    return torch.convolution(x, weight, bias, *convolution[:3], False, [0] * (x.ndim - 2), convolution.groups)


def product_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, convolution: Convolution | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of input, weight and bias, as autograd would compute them; None: not wanted.

    Args:
        gradient: of the product.
        x, weight: the operands. The one whose own gradient alone is wanted is not read, but for its shape.
        convolution: see `product`.
        wanted: which of the three.
    """
    needs_x, needs_weight, needs_bias = wanted
    if convolution is not None:
        stride, padding, dilation, groups = convolution
        sizes = [weight.shape[0]] if needs_bias else None
        none = [0] * len(stride)
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
            gradient, x, weight, sizes, stride, padding, dilation, False, none, groups, list(wanted)
        )
        return found
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        (rows @ weight).view(x.shape) if needs_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
        rows.sum(0) if needs_bias else None,
    )
