"""The scale of a block by its error: each candidate is tried, and the one with the least squared error is taken.

    e_c = Σ ((s_c · cast(x / s_c) - x) / s_0)²               over the block, c the candidates, s_0 the first of them

The earliest of equal ones is kept, the first one also where errors are NaN or infinite. The sum has one order, halves
on halves (element i and i + n/2, and so on), so that the kernels find the same bits. Divided by s_0, no square
overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lq_plugin.functional.minifloat import Minifloat, round_to_minifloat


def least_error(
    x: Tensor, candidates: Sequence[Tensor], scaling: Callable[[Tensor], tuple[Tensor, Tensor]], element: Minifloat
) -> Tensor:
    """Returns the candidate of each block with the least squared error, without a gradient.

    Args:
        x: `[O, G, n, *k]`, one block along dim 2, n a power of two.
        candidates: stored scales `[O, G, 1, *k]`, the preferred one first.
        scaling: scale and its inverse, as the format rounds them, of a stored scale.
        element: format of the elements.

    >>> from lq_plugin.functional.minifloat import E2M1
    >>> x = torch.tensor([[[4.0, 3.0, 2.0, 1.0]], [[6.0, 3.0, 2.0, 5.0]]])
    >>> one = torch.ones(2, 1, 1)
    >>> least_error(x, [one, 2 * one], lambda scale: (scale, 1 / scale), E2M1).flatten()
    tensor([1., 1.])
    >>> least_error(1.25 * x, [1.25 * 4 / 6 * one, 1.25 * one], lambda scale: (scale, 1 / scale), E2M1).flatten()
    tensor([1.2500, 1.2500])
    """
    if len(candidates) == 1:
        return candidates[0]
    x = x.detach().float()
    best, weight = candidates[0], scaling(candidates[0])[1]
    least = _error(x, *scaling(best), weight, element)
    for candidate in candidates[1:]:
        error = _error(x, *scaling(candidate), weight, element)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _error(x: Tensor, scale: Tensor, inverse: Tensor, weight: Tensor, element: Minifloat) -> Tensor:
    e = round_to_minifloat(x * inverse, element).mul_(scale).sub_(x).mul_(weight).square_()
    while (half := e.shape[2] // 2) > 0:
        e = e[:, :, :half] + e[:, :, half:]
    return e
