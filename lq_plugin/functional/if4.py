"""IF4: a block of 16 is small floats or integers, whichever err less, under NVFP4's scales.

    g, s          NVFP4's: of the tensor, and E4M3 for a block           (`lq_plugin.functional.nvfp4`)
    floats:       x̂ = s · g · cast(x / (s · g))                          (E2M1, up to 6)
    integers:     x̂ = δ · clip(round(x / δ), -7, 7),  δ = s · g · 6 / 7  (7 δ is the largest float, too)

Floats are finer next to zero, integers next to the largest magnitude. A block takes the integers where its squared
error is less than that of the floats. s is positive, so its sign says which: the choice costs no bit of its own.

| part | bits |
|---|---|
| element | 4: E2M1, or two's complement |
| s, its sign set for integers | 8 / 16 |
| g | 32 a tensor |

4.5 bits an element, as NVFP4 has.

Reference: Cook et al., "Adaptive Block-Scaled Data Types" (arXiv 2603.28765), formulas from the authors' code
(mit-han-lab/fouroversix, `select_intfloat`); a scale that would be 0 is 2^-9 here, as in NVFP4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.functional.affine import fake_quantize
from lq_plugin.functional.minifloat import E2M1, fake_quantize_minifloat
from lq_plugin.functional.nvfp4 import nvfp4_scales
from lq_plugin.intent.spec import IntegerGrid

#: Levels of a block of integers.
GRID = IntegerGrid(-7, 7)


def if4_step(scale: Tensor, integers: Tensor) -> Tensor:
    """Returns the factor of a block's levels: s · g of floats, δ of integers.

    Args:
        scale: s · g of each block.
        integers: bool like it, which blocks hold integers.
    """
    return torch.where(integers, scale * (E2M1.max_value / GRID.quant_max), scale)


def cast_if4(x: Tensor, scale: Tensor, integers: Tensor) -> Tensor:
    """Quantizes and dequantizes under known scales and choices, with the straight-through gradient.

    Backward: ∂x̂/∂x = 0 where a float saturates or an integer is clipped, 1 elsewhere; scales and choices are constants.

    Args:
        x: float tensor of any shape.
        scale: s · g, float32, broadcastable to `x`.
        integers: bool like `scale`, where `x` becomes integers.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> x = torch.tensor([5.0, 2.5])
    >>> cast_if4(x, torch.ones(2), torch.tensor([False, True]))  # 4; 3 · 6 / 7
    tensor([4.0000, 2.5714])
    """
    step = if4_step(scale, torch.ones_like(integers))
    whole = fake_quantize(x, step, torch.zeros_like(step), GRID)
    return torch.where(integers, whole, fake_quantize_minifloat(x, scale, scale.reciprocal(), E2M1))


def if4_scales(x: Tensor, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns s of every block, which blocks become integers, and g.

    Args:
        x: `[O, G, 16, *k]`, one block along dim 2, padded with zeros where it is ragged.
        tensor_scale: g, float32 `[]` or broadcastable to the block scales; by default that of `x`.

    Returns:
        `(s, integers, g)`: s float32 and bool `[O, G, 1, *k]`, s values of E4M3 in 2^-9..448; g.

    >>> s, integers, g = if4_scales(torch.tensor([[[7.0, 5.0] + 14 * [0.0], [6.0, 0.5] + 14 * [0.0]]]), torch.ones(()))
    >>> s.flatten(), integers.flatten()
    (tensor([1.1250, 1.0000]), tensor([ True, False]))
    """
    x = x.detach().float()
    block, g = nvfp4_scales(x, tensor_scale)
    scale = block * g
    # Divided by the scale no square overflows.
    floats, whole = (
        ((cast_if4(x, scale, torch.full_like(scale, chosen, dtype=torch.bool)) - x) / scale).square().sum(2, True)
        for chosen in (False, True)
    )
    return block, whole < floats, g


def fake_quantize_if4(x: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """Quantizes and dequantizes blocks, with the gradient of `cast_if4`.

    Args:
        x: `[O, G, 16, *k]`, one block along dim 2, padded with zeros where it is ragged.
        tensor_scale: g, float32 `[]` or broadcastable to the block scales; by default that of `x`.
    """
    block, integers, g = if4_scales(x, tensor_scale)
    return cast_if4(x, block * g, integers)
