"""OCP microscaling formats: MXFP8, MXFP6, MXFP4 and MXINT8, a power of two for each 32 elements.

For a block V of 32 elements along the reduction dim, with elements of the largest value `max` = μ · 2^emax, 1 ≤ μ < 2:

    X = 2^E,     x̂ = X · cast(x / X)        (cast: half to even, saturating; `lq_plugin.functional.minifloat`)

| mode | E for a = max|V| |
|---|---|
| `floor` (the specification's) | floor(log2 a) - emax |
| `ceil` | ceil(log2 a) - emax |
| `rceil` (torchao's and NVIDIA's) | ceil(log2(a / max)), the smallest E that clips nothing |
| `even` | floor(log2(a rounded half up to the element's mantissa bits)) - emax |
| `mse` | that of `floor`, one less or one more: the one with the least squared error on the block |

E is clipped to -127..127 (E8M0); it is -127 for a block of zeros. `floor` saturates where a's own mantissa exceeds μ.
A NaN makes its block NaN; infinities count as the largest float32 in a. Values next to the largest float32 may
round up to infinity.

| format | elements | emax | max | bits an element: with 8 / 32 for X |
|---|---|---|---|---|
| MXFP8 | E4M3 / E5M2 | 8 / 15 | 448 / 57344 | 8.25 |
| MXFP6 | E3M2 / E2M3 | 4 / 2 | 28 / 7.5 | 6.25 |
| MXFP4 | E2M1 | 2 | 6 | 4.25 |
| MXINT8 | 8-bit integer · 2^-6 | 0 | 127/64 | 8.25 |

MXINT8 does not use -128 (-2.0), so that its levels are symmetric.

Reference: Open Compute Project, "Microscaling Formats (MX) Specification" v1.0, 2023, sections 5 and 6.3;
Rouhani et al., "Microscaling Data Formats for Deep Learning" (arXiv 2310.10537), algorithm 1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lq_plugin.functional.block_choice import least_error
from lq_plugin.functional.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, Minifloat, fake_quantize_minifloat

#: Elements that share a scale of 8 bits.
BLOCK = 32

ScaleMode = Literal["floor", "rceil", "ceil", "even", "mse"]
MODES: tuple[str, ...] = get_args(ScaleMode)

#: Elements by the name of the format.
ELEMENTS: dict[str, Minifloat] = {
    "mxfp8_e4m3": E4M3,
    "mxfp8_e5m2": E5M2,
    "mxfp6_e3m2": E3M2,
    "mxfp6_e2m3": E2M3,
    "mxfp4": E2M1,
    "mxint8": INT8,
}


def mx_scale(x: Tensor, element: Minifloat, mode: ScaleMode = "floor") -> Tensor:
    """Returns X of every block.

    Args:
        x: `[O, G, 32, *k]`, one block along dim 2, padded with zeros where it is ragged.
        element: format of the elements.
        mode: how the exponent is found.

    Returns:
        Float32 `[O, G, 1, *k]`, powers of two from 2^-127 to 2^127; NaN for a block with a NaN.

    Raises:
        ValueError: when there is no such mode.

    >>> block = torch.tensor([7.0] + 31 * [0.0]).reshape(1, 1, 32)
    >>> [mx_scale(block, E2M1, mode).item() for mode in MODES]
    [1.0, 2.0, 2.0, 2.0, 1.0]
    """
    if mode not in MODES:
        raise ValueError(f"no scale mode {mode!r}; it is one of {', '.join(MODES)}")
    amax = x.detach().float().abs().amax(2, keepdim=True)
    # amax = m · 2^e, m in [0.5, 1), exact for every float32
    m, e = torch.frexp(amax.clamp(max=torch.finfo(torch.float32).max))
    exponent = e - 1 - element.max_exponent
    if mode == "rceil":
        exponent += m > math.frexp(element.max_value)[0]
    elif mode == "ceil":
        exponent += m > 0.5
    elif mode == "even":
        exponent += m >= 1.0 - 2.0 ** -(element.mantissa_bits + 2)
    exponent = torch.where(amax > 0, exponent, -127)
    scale = power_of_two(exponent.clamp(-127, 127))
    if mode == "mse":
        near = [power_of_two((exponent + shift).clamp(-127, 127)) for shift in (-1, 1)]
        scale = least_error(x, [scale, *near], lambda scale: (scale, scale.reciprocal()), element)
    return torch.where(amax.isnan(), amax, scale)


def fake_quantize_mx(x: Tensor, element: Minifloat, mode: ScaleMode = "floor") -> Tensor:
    """Quantizes and dequantizes blocks, with the straight-through gradient.

    Forward:  x̂ = X · cast(x / X)

    Backward: ∂x̂/∂x = 0 where the element saturates (|x / X|, rounded by the step next to the largest value, is beyond
    it), 1 elsewhere; X is a constant. With `rceil` and `ceil` nothing saturates while E is not clipped.

    Args:
        x: `[O, G, 32, *k]`, one block along dim 2, padded with zeros where it is ragged.
        element: format of the elements: E4M3, E5M2, E3M2, E2M3, E2M1, or INT8 (-127..127 over 64; -128 is not used).
        mode: how the exponent is found.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> x = torch.tensor([7.0, 1.2, -0.7] + 29 * [0.0]).reshape(1, 1, 32)
    >>> fake_quantize_mx(x, E2M1)[0, 0, :3], fake_quantize_mx(x, E2M1, "rceil")[0, 0, :3]
    (tensor([ 6.0000,  1.0000, -0.5000]), tensor([ 8.,  1., -1.]))
    """
    scale = mx_scale(x, element, mode)
    return fake_quantize_minifloat(x, scale, scale.reciprocal(), element)


def power_of_two(exponent: Tensor) -> Tensor:
    """Returns 2^exponent for int32 -127..127, from the bits: exp2 may flush 2^-127, a subnormal, to zero."""
    return torch.where(exponent > -127, (exponent + 127) << 23, 1 << 22).to(torch.int32).view(torch.float32)
