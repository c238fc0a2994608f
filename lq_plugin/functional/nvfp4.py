"""NVFP4: E2M1 elements, an E4M3 scale for each 16 of them, one float32 scale above.

    g = max|x| / (6 · 448)                                       (the tensor's)
    s = clip(E4M3(max|block| / 6 / g), 2^-9, 448)                (the block's)
    x̂ = s · g · cast(x / (s · g))                                (E2M1: half to even, saturating at ±6)

| part | bits |
|---|---|
| element | 4 |
| s | 8 / 16 |
| g | 32 a tensor |

4.5 bits an element. A scale s that would be 0 is 2^-9, the smallest E4M3 value: a block 448 · 2^10 times smaller than
the tensor's largest keeps what it can instead of being erased, which is never worse. g is at least 2^-100, so that
a tensor of zeros has a finite inverse. A g smaller than max|x| asks for (found on other data) clips.

Reference: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix C.
"""

from __future__ import annotations

from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.minifloat import E2M1, E4M3, fake_quantize_minifloat, round_to_minifloat

#: Elements that share a block scale, and its bits.
BLOCK, SCALE_BITS = 16, 8


def nvfp4_tensor_scale(amax: Tensor) -> Tensor:
    """Returns g for the largest magnitude of a tensor: amax / (6 · 448), at least 2^-100.

    >>> import torch
    >>> nvfp4_tensor_scale(torch.tensor(5376.0))
    tensor(2.)
    """
    return (amax.float() / (E2M1.max_value * E4M3.max_value)).clamp(min=MIN_SCALE)


def nvfp4_scales(x: Tensor, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns s of every block, and g.

    Args:
        x: `[O, G, 16, *k]`, one block along dim 2, padded with zeros where it is ragged.
        tensor_scale: g, float32 `[]` or broadcastable to the block scales; by default that of `x`.

    Returns:
        `(s, g)`: s float32 `[O, G, 1, *k]`, values of E4M3 in 2^-9..448; g.

    >>> import torch
    >>> nvfp4_scales(torch.tensor([[[5376.0] + 15 * [0.0], [12.0] + 15 * [0.0]]]))
    (tensor([[[448.],
             [  1.]]]), tensor(2.))
    """
    amax = x.detach().float().abs().amax(2, keepdim=True)
    if tensor_scale is None:
        tensor_scale = nvfp4_tensor_scale(amax.amax())
    wanted = amax / E2M1.max_value / tensor_scale
    return round_to_minifloat(wanted, E4M3).clamp_(min=E4M3.smallest), tensor_scale


def fake_quantize_nvfp4(x: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """Quantizes and dequantizes blocks, with the straight-through gradient.

    Forward:  x̂ = s · g · cast(x · (1 / g / s))

    Backward: ∂x̂/∂x = 0 where the element saturates (|x / (s · g)|, rounded by the step 2 next to 6, is beyond 6),
    1 elsewhere; the scales are constants.

    Args:
        x: `[O, G, 16, *k]`, one block along dim 2, padded with zeros where it is ragged.
        tensor_scale: g, float32 `[]` or broadcastable to the block scales; by default that of `x`.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> import torch
    >>> x = torch.tensor([5376.0, 1000.0] + 14 * [0.0]).reshape(1, 1, 16)
    >>> fake_quantize_nvfp4(x)[0, 0, :2]
    tensor([5376.,  896.])
    """
    block, tensor_scale = nvfp4_scales(x, tensor_scale)
    return fake_quantize_minifloat(x, block * tensor_scale, tensor_scale.reciprocal() / block, E2M1)
