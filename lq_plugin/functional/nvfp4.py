"""NVFP4: E2M1 elements, an E4M3 scale for each 16 of them, one float32 scale above.

    g = max|x| / (6 · 448)                                       (the tensor's)
    s = clip(E4M3(max|block| / 6 / g), 2^-9, 448)                (the block's)
    x̂ = s · g · cast(x / (s · g))                                (E2M1: half to even, saturating at ±6)

Four over six: values next to the largest one are the worst, steps of E2M1 being 2 between 4 and 6. For each block the
scale that maps max|block| to 6 is compared with the one that maps it to 4, and the one with the less squared error is
taken (the first where both are equal). The scale for 4 is 1.5 times the other: g = max|x| / (6 · 256) leaves room for
it, as 1.5 · 256 is a value of E4M3.

| part | bits |
|---|---|
| element | 4 |
| s | 8 / 16 |
| g | 32 a tensor |

4.5 bits an element. A scale s that would be 0 is 2^-9, the smallest E4M3 value: a block 448 · 2^10 times smaller than
the tensor's largest keeps what it can instead of being erased, which is never worse. g is at least 2^-100, so that
a tensor of zeros has a finite inverse. A g smaller than max|x| asks for (found on other data) clips.

Reference: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix C; Cook et al., "Four
Over Six: More Accurate NVFP4 Quantization with Adaptive Block Scaling" (arXiv 2512.02010), section 3.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.block_choice import least_error
from lq_plugin.functional.minifloat import E2M1, E4M3, fake_quantize_minifloat, round_to_minifloat

#: Elements that share a block scale of 8 bits.
BLOCK = 16

#: What the largest magnitude of a block is mapped to: 6, or whichever of 6 and 4 errs less.
Target = Literal["max", "four_six"]
TARGETS: tuple[str, ...] = get_args(Target)
#: The scale of the block with the tensor's largest magnitude, mapped to 6.
_LARGEST_SCALE = {"max": E4M3.max_value, "four_six": 256.0}


def nvfp4_tensor_scale(amax: Tensor, target: Target = "max") -> Tensor:
    """Returns g for the largest magnitude of a tensor: amax / (6 · 448), at least 2^-100; / (6 · 256) for `four_six`.

    >>> import torch
    >>> nvfp4_tensor_scale(torch.tensor(5376.0))
    tensor(2.)
    """
    return (amax.float() / (E2M1.max_value * _LARGEST_SCALE[target])).clamp(min=MIN_SCALE)


def nvfp4_scales(x: Tensor, tensor_scale: Tensor | None = None, target: Target = "max") -> tuple[Tensor, Tensor]:
    """Returns s of every block, and g.

    Args:
        x: `[O, G, 16, *k]`, one block along dim 2, padded with zeros where it is ragged.
        tensor_scale: g, float32 `[]` or broadcastable to the block scales; by default that of `x`.
        target: what the largest magnitude of a block is mapped to.

    Returns:
        `(s, g)`: s float32 `[O, G, 1, *k]`, values of E4M3 in 2^-9..448; g.

    >>> import torch
    >>> nvfp4_scales(torch.tensor([[[5376.0] + 15 * [0.0], [12.0] + 15 * [0.0]]]))
    (tensor([[[448.],
             [  1.]]]), tensor(2.))
    """
    amax = x.detach().float().abs().amax(2, keepdim=True)
    if tensor_scale is None:
        tensor_scale = nvfp4_tensor_scale(amax.amax(), target)
    g = tensor_scale
    found = [
        round_to_minifloat(amax / largest / g, E4M3).clamp_(min=E4M3.smallest)
        for largest in (E2M1.max_value, 4.0)[: 1 if target == "max" else 2]
    ]
    return least_error(x, found, lambda block: (block * g, g.reciprocal() / block), E2M1), g


def fake_quantize_nvfp4(x: Tensor, tensor_scale: Tensor | None = None, target: Target = "max") -> Tensor:
    """Quantizes and dequantizes blocks, with the straight-through gradient.

    Forward:  x̂ = s · g · cast(x · (1 / g / s))

    Backward: ∂x̂/∂x = 0 where the element saturates (|x / (s · g)|, rounded by the step 2 next to 6, is beyond 6),
    1 elsewhere; the scales are constants.

    Args:
        x: `[O, G, 16, *k]`, one block along dim 2, padded with zeros where it is ragged.
        tensor_scale: g, float32 `[]` or broadcastable to the block scales; by default that of `x`.
        target: what the largest magnitude of a block is mapped to.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> import torch
    >>> x = torch.tensor([5376.0, 1000.0] + 14 * [0.0]).reshape(1, 1, 16)
    >>> fake_quantize_nvfp4(x)[0, 0, :2]
    tensor([5376.,  896.])
    """
    block, tensor_scale = nvfp4_scales(x, tensor_scale, target)
    return fake_quantize_minifloat(x, block * tensor_scale, tensor_scale.reciprocal() / block, E2M1)
