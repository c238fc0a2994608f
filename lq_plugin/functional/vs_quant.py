"""VS-Quant: an integer scale for each short vector, one float scale above it.

Per vector i of V elements along the reduction dim, with N-bit elements and M-bit scales:

    s_i = the scale its range asks for                      (level 1, float)
    γ   = max_i s_i / (2^M - 1)                             (level 2: one per tensor, or per output channel)
    ŝ_i = clip(round(s_i / γ), 1, 2^M - 1)                  (the integer that is stored)
    x̂   = γ · ŝ_i · (clip(round(x / (γ · ŝ_i)) + z) - z)

The paper rounds x with the float s_i and quantizes the scale afterwards; here x is rounded with the scale that
it is multiplied with again, which is never worse. A scale of 0, which would erase its vector, is 1 instead.
With range `mse` the integer of each vector of a weight is the one with the least squared error at this γ.
An element takes N + M / V bits: 4 + 4 / 16 = 4.25. Scales are constants of the straight-through gradient.

Reference: Dai et al., "VS-Quant: Per-vector Scaled Quantization for Accurate Low-Precision Neural Network
Inference", MLSys 2021 (arXiv 2102.04503), section 4.
"""

from __future__ import annotations

from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE


def coarse_scale(scale: Tensor, scale_bits: int, per_channel: bool = False) -> Tensor:
    """Returns γ, the float scale above the vectors' scales.

    Args:
        scale: s_i, `[O, G, 1, *k]`.
        scale_bits: M.
        per_channel: one γ for each output channel (dim 0) instead of one for the tensor.

    Returns:
        γ, broadcastable to `scale`.
    """
    dims = list(range(1 if per_channel else 0, scale.ndim))
    y: Tensor = (scale.amax(dims, keepdim=True) / (2**scale_bits - 1)).clamp(min=MIN_SCALE)
    return y


def integer_scale(scale: Tensor, coarse: Tensor, scale_bits: int) -> Tensor:
    """Returns ŝ_i, integers in 1..2^M - 1 as float32, shaped like `scale`.

    Args:
        scale: s_i.
        coarse: γ, broadcastable to it.
        scale_bits: M.

    >>> import torch
    >>> s = torch.tensor([0.3, 0.01, 0.17])
    >>> integer_scale(s, coarse_scale(s, 4), 4)
    tensor([15.,  1.,  8.])
    """
    return (scale / coarse).round_().clamp_(1, 2**scale_bits - 1)
