"""TWN: ternary weights -α, 0, +α that minimize ‖W - α·T‖².

    T = +1 where W > Δ, -1 where W < -Δ, else 0;        α = mean of |W| over |W| > Δ

For a given Δ that α is optimal; the optimal threshold maximises

    (Σ_{|W| > Δ} |W|)² / #{|W| > Δ}                     (eq. 6)

which one sort and a cumulative sum solve exactly. The paper approximates it by Δ = 0.7 · E|W|, right for a uniform
or normal distribution; for a Laplace one the optimum is E|W| itself. Backward: straight through, ∂T·α/∂W = 1.

Reference: Li, Zhang, Liu, "Ternary Weight Networks", 2016 (arXiv 1605.04711).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.pieces import AT_A_TIME, elementwise, pieces, sort_rows
from lq_plugin.functional.transforms import applied

#: Δ over E|W|, in the paper; the authors' later code takes 0.75.
THRESHOLD = 0.7


def approximate_threshold(rows: Tensor, factor: float = THRESHOLD, count: Tensor | None = None) -> Tensor:
    """Returns Δ = factor · E|W| of each row, `[R]`.

    Args:
        rows: `[R, n]`, what shares a scale in a row.
        factor: 0.7 in the paper.
        count: `[R]`, weights of each row, where some of its elements are padding with zeros.

    >>> approximate_threshold(torch.tensor([[1.0, -3.0]]))
    tensor([1.4000])
    """
    return factor * rows.float().abs().sum(1) / (rows.shape[1] if count is None else count)


def exact_threshold(rows: Tensor) -> Tensor:
    """Returns the Δ of each row that minimizes the squared error, half way between two magnitudes.

    Args:
        rows: `[R, n]`.

    >>> exact_threshold(torch.tensor([[0.1, 1.0, -1.0, 0.2]]))
    tensor([0.6000])
    """
    at_a_time = AT_A_TIME // 8  # each takes several float64 numbers
    if len(rows) > 1 and rows.numel() > at_a_time:
        return torch.cat([exact_threshold(some) for some in rows.split(max(at_a_time // rows.shape[1], 1))])
    descending = sort_rows(rows.float().abs().neg_()).neg_()
    total = best = torch.zeros_like(descending[:, :1], dtype=torch.float64)
    place = torch.zeros_like(total, dtype=torch.int64)
    done, length = 0, descending.shape[1]
    for index in pieces(descending.shape, at_a_time):
        sums = torch.cat([total, descending[index].double()], 1).cumsum(1)[:, 1:]
        count = torch.arange(done + 1, done + 1 + sums.shape[1], device=rows.device)
        gain, here = (sums.square() / count).max(1, keepdim=True)
        place = torch.where(gain > best, here + done, place)
        best, total, done = torch.maximum(gain, best), sums[:, -1:], done + sums.shape[1]
    # 0 stands after the last one: then every weight is kept.
    following = descending.gather(1, (place + 1).clamp(max=length - 1)) * (place + 1 < length)
    return ((descending.gather(1, place) + following) / 2).squeeze(1)


def ternary_scale(rows: Tensor, threshold: Tensor) -> Tensor:
    """Returns α of each row: the mean magnitude above the threshold, 0 where nothing is above it.

    >>> ternary_scale(torch.tensor([[0.1, 1.0, -2.0]]), torch.tensor([0.5]))
    tensor([1.5000])
    """
    magnitude = rows.float().abs()
    count = _keep_above(magnitude, threshold)
    return magnitude.sum(1) / count.clamp(min=1)


def _keep_above(magnitude: Tensor, threshold: Tensor) -> Tensor:
    """Sets to 0 what is not above the threshold of its row; returns how many of each row are left."""
    if magnitude.numel() > AT_A_TIME:
        if len(magnitude) == 1:
            return torch.stack([_keep_above(some, threshold) for some in magnitude.split(AT_A_TIME, 1)]).sum(0)
        step = max(AT_A_TIME // magnitude.shape[1], 1)
        return torch.cat(
            [_keep_above(*some) for some in zip(magnitude.split(step), threshold.split(step), strict=True)]
        )
    kept = torch.gt(magnitude, threshold.unsqueeze(1), out=torch.empty_like(magnitude))
    magnitude.mul_(kept)
    return kept.sum(1)


def ternarize(x: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    """Returns -α, 0 or +α, with the straight-through gradient.

    Args:
        x: float tensor.
        threshold, scale: Δ and α, broadcastable to it.
    """
    y: Tensor = applied(_Ternarize, x, threshold, scale)
    return y


def ternary_signs(x: Tensor, threshold: Tensor) -> Tensor:
    """Returns -1, 0 or +1, float32.

    >>> ternary_signs(torch.tensor([-2.0, 0.1, 0.6]), torch.tensor(0.5))
    tensor([-1.,  0.,  1.])
    """
    if x.numel() > AT_A_TIME:
        return elementwise(ternary_signs, x, threshold)
    above, below = sides(x, threshold)
    return above.sub_(below)


def sides(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Returns 1 where x > Δ, and 1 where x < -Δ, else 0, in the dtype of `x` and without a gradient.

    >>> sides(torch.tensor([-2.0, 0.1, 0.6]), torch.tensor(0.5))
    (tensor([0., 0., 1.]), tensor([1., 0., 0.]))
    """
    # Not through booleans, which take several times as long on CPU.
    x = x.detach()
    return torch.gt(x, threshold, out=torch.empty_like(x)), torch.lt(x, -threshold, out=torch.empty_like(x))


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Any, scale: Tensor) -> Any:
        return ternary_signs(x.float(), threshold).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None
