"""Coordinate descent: codes and scales of a rounded weight in turns, each the best one while all others stay.

With H = 2 X Xᵀ + λ I over the inputs X, Ŵ = s · l the rounded weight and G = (W - Ŵ) H, the error
tr (W - Ŵ) H (W - Ŵ)ᵀ of the layer's output is quadratic in each column, and in each scale:

    scale of the columns C:   s ← s + (G_C · l_C) / (l_C H_CC l_Cᵀ)           the levels l stay
    code of column j:         ŵ_j ← quantize(ŵ_j + G_j / H_jj)                 the scales stay

Neither can raise the error. GPTQ decides on each column once, with those before it rounded and those after it free;
here all are rounded, and each decision is looked at again. Scales are calibrated for the weight alone, and what the
inputs make of it asks for others.

Reference: Zhang et al., "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization" (arXiv 2403.07134),
which takes codes and scales as coordinates, and Behdin et al., "QuantEase" (arXiv 2309.01885), codes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lq_plugin.functional.fixed_levels import FixedLevels

#: Columns that are done before the others hear of it; it changes the speed alone.
_AT_ONCE = 128
#: Scales stay within these multiples of what they were.
_BOUNDS = (0.5, 2.0)


@torch.no_grad()
def descend(
    weight: Tensor, rounded: Tensor, hessian: Tensor, levels: FixedLevels, columns: Sequence[Tensor], sweeps: int
) -> tuple[Tensor, Tensor]:
    """Returns a better rounding of some rows of a weight, float32, and their scales.

    Args:
        weight: W, `[rows, columns]`.
        rounded: on the levels, of the same shape.
        hessian: H, with its dampening, float64 `[columns, columns]`.
        levels: of each element, their tensors of the weight's shape.
        columns: sets of columns; in a row those of a set share a scale. All columns once.
        sweeps: how often all scales and codes are gone through.

    >>> from lq_plugin.functional.fixed_levels import IntegerLevels
    >>> from lq_plugin.intent.spec import IntegerGrid
    >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9]], dtype=torch.float64)
    >>> w, one = torch.tensor([[0.4, 0.4]]), torch.ones(1, 2)
    >>> levels = IntegerLevels(one, 0 * one, True, IntegerGrid(-2, 1))
    >>> descend(w, torch.tensor([[0.0, 1.0]]), 2 * x.T @ x, levels, [torch.arange(2)], 1)
    (tensor([[0.0000, 0.8199]]), tensor([[0.8199, 0.8199]]))
    """
    w, values, scale = weight.double(), rounded.double(), levels.scale.expand_as(weight).clone()
    levels = levels.mapped(lambda t: t.expand_as(weight))
    start = scale.clone()
    for _ in range(sweeps):
        for some in columns:
            if levels.trainable:
                factor = _scale_step(w, values, hessian, scale, some)
                ratio = (scale[:, some] / start[:, some]).double() * factor
                factor = torch.where((ratio > _BOUNDS[0]) & (ratio < _BOUNDS[1]), factor, 1.0)
                scale[:, some] = (scale[:, some] * factor).float()
                values[:, some] *= factor
            for part in some.split(_AT_ONCE):
                here = replace(levels.mapped(lambda t: t[:, part]), scale=scale[:, part])  # noqa: B023
                _code_step(w, values, hessian, here, part)
    return replace(levels, scale=scale).nearest(values.float()), scale


def _scale_step(w: Tensor, values: Tensor, hessian: Tensor, scale: Tensor, some: Tensor) -> Tensor:
    """Returns what the scales of a set of columns are to be multiplied by, `[rows, 1]`."""
    mine = values[:, some]
    off = (w - values) @ hessian[:, some]
    curvature = ((mine @ hessian[some][:, some]) * mine).sum(1, keepdim=True)
    change = (off * mine).sum(1, keepdim=True) / torch.where(curvature > 0, curvature, 1.0)
    return 1.0 + torch.where(curvature > 0, change, 0.0)


def _code_step(w: Tensor, values: Tensor, hessian: Tensor, levels: FixedLevels, part: Tensor) -> None:
    """Goes through some columns one by one; writes their values."""
    off, inside = (w - values) @ hessian[:, part], hessian[part][:, part]
    for j, column in enumerate(part.tolist()):
        before = values[:, column]
        wanted = before + off[:, j] / inside[j, j]
        after = levels.mapped(lambda t: t[:, j]).nearest(wanted.float()).double()  # noqa: B023
        off[:, j + 1 :] -= torch.outer(after - before, inside[j, j + 1 :])
        values[:, column] = after
