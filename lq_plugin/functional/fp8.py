"""FP8: E4M3 or E5M2 elements under a float32 scale of the tensor, of each channel, or of each square of a weight.

    s = max|x| / max                  (max: 448 of E4M3, 57344 of E5M2; at least 2^-100)
    x̂ = s · cast(x / s)               (cast: half to even, saturating; `lq_plugin.functional.minifloat`)

The quotient is a division, as runtimes and torch's `(x / s).to(torch.float8_e4m3fn)` have it, and not a product with
1 / s; values are those of that cast, saturated. E4M3 is the variant without infinities ("fn"). A tensor of zeros stays
zero. A scale smaller than max|x| asks for (a percentile, or found on other data) clips.

Reference: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433), section 3; for squares of 128 x 128:
DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 3.3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.minifloat import E4M3, E5M2, Minifloat, round_to_minifloat, saturates
from lq_plugin.functional.transforms import applied

#: Elements by the word after the colon.
ELEMENTS: dict[str, Minifloat] = {"e4m3": E4M3, "e5m2": E5M2}


def fp8_scale(minimum: Tensor, maximum: Tensor, element: Minifloat) -> Tensor:
    """Returns the smallest scale that clips neither bound, float32.

    Args:
        minimum, maximum: of the values that share it, of one shape.
        element: E4M3 or E5M2.

    >>> fp8_scale(torch.tensor(-896.0), torch.tensor(10.0), E4M3)
    tensor(2.)
    """
    bound = torch.maximum(-minimum.float(), maximum.float())
    return (bound / element.max_value).clamp(min=MIN_SCALE)


def fake_quantize_fp8(x: Tensor, scale: Tensor, element: Minifloat) -> Tensor:
    """Casts under a scale, with the straight-through gradient.

    Forward:  x̂ = s · cast(x / s)

    Backward: ∂x̂/∂x = 0 where the element saturates, that is where |x / s|, rounded by the step next to the largest
    value, is beyond it; 1 elsewhere. The scale is a constant.

    Args:
        x: float tensor of any shape.
        scale: float32, broadcastable to `x`.
        element: E4M3 or E5M2.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> x = torch.tensor([0.3, -1000.0], requires_grad=True)
    >>> y = fake_quantize_fp8(x, torch.tensor(1.0), E4M3)
    >>> y.sum().backward()
    >>> y.detach(), x.grad
    (tensor([ 3.1250e-01, -4.4800e+02]), tensor([1., 0.]))
    """
    y: Tensor = applied(_FakeQuantizeFP8, x, scale, element)
    return y


class _FakeQuantizeFP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, element: Any) -> Any:
        ctx.save_for_backward(x, scale)
        ctx.element = element
        return round_to_minifloat(x.float() / scale, element).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return grad.masked_fill(saturates(x.float() / scale, ctx.element), 0.0), None, None
