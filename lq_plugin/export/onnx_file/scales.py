"""Scales of weights in an ONNX file: factors of a batch norm moved into them, and channels of zeros."""

from __future__ import annotations

import torch
from torch import Tensor

#: Scale of a weight that is 0 everywhere. In steps of it times that of an activation of zeros, 2^-10, biases up to 32
#: fit into int32, with 26 fractional bits.
SCALE_OF_ZERO_WEIGHTS = 2.0**-16


def times(q: Tensor, scale: Tensor, factor: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
    """Returns integers and scales of weights whose channels are multiplied with a factor each.

    A negative factor changes the sign of the integers where their type holds all the negatives, else that of the scale.
    A factor of 0 leaves no weight. All of it is exact.

    Args:
        q: `[C_out, ...]`, no smaller than the type's `lowest`; 0: of a type without negatives.
        scale: `[C_out, ...]`.
        factor: `[C_out]`.
    """
    gone = factor == 0
    opposite = (factor < 0) & (q.flatten(1).amin(1) > lowest) & (lowest < 0)
    factor = torch.where(opposite, -factor, factor)
    over_q, over_scale = (-1, *[1] * (q.ndim - 1)), (-1, *[1] * (scale.ndim - 1))
    q = torch.where(opposite.view(over_q), -q, q).masked_fill(gone.view(over_q), 0)
    return q, (scale * factor.view(over_scale)).masked_fill(gone.view(over_scale), 1.0)


def ordinary(scale: Tensor, q: Tensor, zero_point: Tensor | None) -> Tensor:
    """Returns scales of output channels, with the median one for channels whose weights are all 0.

    There any scale gives the same weights; their own is the smallest possible, and biases are rounded in steps of it.

    Args:
        scale: `[C_out]`.
        q: the weight's integers, `[C_out, ...]`.
        zero_point: `[C_out]`; None: 0.

    >>> ordinary(torch.tensor([0.5, 1e-30]), torch.tensor([[1, 2], [0, 0]]), None)
    tensor([0.5000, 0.5000])
    """
    rows = q.flatten(1) if scale.ndim else q.reshape(1, -1)
    dead = (rows == (0 if zero_point is None else zero_point.reshape(-1, 1))).all(1)
    live = scale.reshape(-1)[~dead].abs()
    return torch.where(dead.view(scale.shape), live.median() if len(live) else SCALE_OF_ZERO_WEIGHTS, scale)
