"""AdaRound: rounding up or down, learned for each weight.

With b = ⌊w / s⌋ + z the level below a weight, and one variable V for each weight:

    h(V) = clip(σ(V) · (ζ - γ) + γ, 0, 1),  ζ = 1.1, γ = -0.1      (eq. 23, rectified sigmoid)
    ŵ    = s · (clip(b + h(V), n, p) - z)                          (eq. 22)
    f    = Σ 1 - |2 h(V) - 1|^β                                    (eq. 24, regulariser)

V starts where ŵ = w, so that nothing changes at first: h(V) = w / s - ⌊w / s⌋. β falls from 20 to 2: at first
only weights near 0 or 1 are drawn there, at the end all are. In the end h ≥ 0.5 rounds up.

A weight beyond the levels is clipped whichever way it is rounded. Such weights, `saturated` here, take no part.

Reference: Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020 (arXiv 2004.10568), section 3.3. β falls along a cosine as in the authors' AIMET.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lq_plugin.intent.spec import IntegerGrid

ZETA, GAMMA = 1.1, -0.1
#: A weight whose h is nearer than this to 0 or 1 counts as decided.
DECIDED = 0.01


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Returns h(V) in 0..1; it reaches both ends, and has no gradient beyond them.

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """Returns V with h(V) = h, for h in 0..1.

    >>> rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor([0.25])))
    tensor([0.2500])
    """
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1.0)


def neighbours(w: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two levels a weight may be rounded to, and its position between them.

    Args:
        w: weights, as blocks that `scale` broadcasts against.
        scale, zero_point: float32.
        grid: the integer levels.

    Returns:
        `(low, high, fraction)`, float32 like `w`: levels less the zero point, in `quant_min - z..quant_max - z`, and
        w / s - ⌊w / s⌋ in 0..1. `low == high` where the weight is saturated.

    >>> w = torch.tensor([-3.0, -0.4, 0.25, 0.9])
    >>> low, high, fraction = neighbours(w, torch.tensor(0.5), torch.tensor(0.0), IntegerGrid(-2, 1))
    >>> low.tolist(), high.tolist()
    ([-2.0, -1.0, 0.0, 1.0], [-2.0, 0.0, 1.0, 1.0])
    """
    ratio = w.detach().float() * scale.reciprocal()
    floor = ratio.floor()
    lowest, highest = grid.quant_min - zero_point, grid.quant_max - zero_point
    return torch.clamp(floor, lowest, highest), torch.clamp(floor + 1.0, lowest, highest), ratio - floor


def regularizer(h: Tensor, beta: float) -> Tensor:
    """Returns 1 - |2h - 1|^β for each weight: 1 at h = 0.5, 0 where it is decided."""
    return 1.0 - (2.0 * h - 1.0).abs().pow(beta)


def beta_at(progress: float, start: float = 20.0, end: float = 2.0) -> float:
    """Returns β after a share of the annealing.

    Args:
        progress: the share, 0..1.
        start, end: β at both ends.

    >>> beta_at(0.0), beta_at(0.5), beta_at(1.0)
    (20.0, 11.0, 2.0)
    """
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def undecided(h: Tensor) -> Tensor:
    """Returns True for the weights that are not yet rounded up or down."""
    return (h > DECIDED) & (h < 1.0 - DECIDED)
