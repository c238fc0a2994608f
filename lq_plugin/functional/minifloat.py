"""Small floating point formats: the elements of MX and NVFP4.

With M mantissa bits and the exponent bias b, for every float32 x:

    e = max(floor(log2|x|), 1 - b)                      (below 2^(1-b): subnormals)
    cast(x) = clip(2^(e-M) · round(x / 2^(e-M)), -max, max)

Rounding is half to even. Values beyond the largest one saturate, infinities also; NaN stays NaN.

| format | exponent bits | M | b | max | smallest | floor(log2 max) |
|---|---|---|---|---|---|---|
| E4M3 | 4 | 3 | 7 | 448 | 2^-9 | 8 |
| E5M2 | 5 | 2 | 15 | 57344 | 2^-16 | 15 |
| E3M2 | 3 | 2 | 3 | 28 | 2^-4 | 4 |
| E2M3 | 2 | 3 | 1 | 7.5 | 2^-3 | 2 |
| E2M1 | 2 | 1 | 1 | 6 | 2^-1 | 2 |
| INT8 | 1 | 6 | 1 | 127/64 | 2^-6 | 0 |

E4M3 is the variant without infinities ("fn"). INT8 is the 8-bit integer over 64: -127..127 by steps of 2^-6 are the
values of a float with one exponent bit. Its code -128 is not used.

Reference: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433), section 3; Open Compute Project,
"Microscaling Formats (MX) Specification" v1.0, 2023, section 5.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.transforms import applied

#: The exponent field of a float32: as a float32 of its own, the largest power of two that is not above |x|.
_EXPONENT_FIELD = 0x7F800000


@dataclass(frozen=True)
class Minifloat:
    """A floating point format of few bits.

    Args:
        exponent_bits, mantissa_bits: widths of the fields; the sign is one more bit.
        bias: b.
        max_value: the largest finite value.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_value: float

    @property
    def bit_width(self) -> int:
        """Number of bits of an element."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value, and of the subnormals."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_value))."""
        return math.frexp(self.max_value)[1] - 1

    @property
    def smallest(self) -> float:
        """The smallest positive value.

        >>> E4M3.smallest == 2**-9
        True
        """
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def largest_step(self) -> float:
        """Distance between values next to the largest one."""
        return 2.0 ** (self.max_exponent - self.mantissa_bits)

    def values(self) -> Tensor:
        """Returns all values from zero up, ascending, float32.

        >>> E2M1.values()
        tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])
        """
        codes = torch.arange(2 ** (self.exponent_bits + self.mantissa_bits))
        exponent, mantissa = codes >> self.mantissa_bits, codes & (2**self.mantissa_bits - 1)
        significand = mantissa + 2**self.mantissa_bits * (exponent > 0)
        values = significand * torch.exp2((exponent.clamp(min=1) - self.bias - self.mantissa_bits).double())
        y: Tensor = values[values <= self.max_value].float()
        return y


E4M3 = Minifloat(4, 3, 7, 448.0)
E5M2 = Minifloat(5, 2, 15, 57344.0)
E3M2 = Minifloat(3, 2, 3, 28.0)
E2M3 = Minifloat(2, 3, 1, 7.5)
E2M1 = Minifloat(2, 1, 1, 6.0)
INT8 = Minifloat(1, 6, 1, 127 / 64)


def round_to_minifloat(x: Tensor, fmt: Minifloat) -> Tensor:
    """Returns the value of `fmt` nearest to each element, half to even, saturating, without a gradient.

    Args:
        x: float tensor of any shape.
        fmt: the format.

    Returns:
        Float32, the shape of `x`; exact for every float32, subnormal ones also.

    >>> round_to_minifloat(torch.tensor([0.2, 0.25, 2.5, -3.6, 100.0]), E2M1)
    tensor([ 0.,  0.,  2., -4.,  6.])
    """
    x = x.detach().float().clamp(-fmt.max_value, fmt.max_value)
    # A power of two from the bits; NaN gives inf, and NaN / inf is NaN.
    power = (x.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)
    step = power.clamp_(min=2.0**fmt.min_exponent).mul_(2.0**-fmt.mantissa_bits)
    return x.div_(step).round_().mul_(step)


def minifloat_codes(x: Tensor, fmt: Minifloat) -> Tensor:
    """Returns the bits of each element rounded to `fmt`, int32: the sign, and the index of the magnitude below it.

    >>> minifloat_codes(torch.tensor([1.5, -6.0]), E2M1)
    tensor([ 3, 15], dtype=torch.int32)
    """
    value = round_to_minifloat(x, fmt)
    index = torch.searchsorted(fmt.values().to(x.device), value.abs().contiguous(), out_int32=True)
    return index.add_(value.signbit().to(torch.int32), alpha=1 << (fmt.bit_width - 1))


def minifloat_values(codes: Tensor, fmt: Minifloat) -> Tensor:
    """Returns the values of codes, float32.

    Raises:
        IndexError: a code is none of a finite value.
    """
    half = 1 << (fmt.bit_width - 1)
    magnitude = fmt.values().to(codes.device)[codes.long() % half]
    return torch.where(codes >= half, -magnitude, magnitude)


def signed_values(fmt: Minifloat) -> Tensor:
    """Returns all values of a format, ascending, float32; zero is one value, in the middle.

    >>> len(signed_values(E4M3)), signed_values(E2M1)[6:9].tolist()
    (253, [-0.5, 0.0, 0.5])
    """
    values = fmt.values()
    return torch.cat([-values[1:].flip(0), values])


def saturates(x: Tensor, fmt: Minifloat) -> Tensor:
    """Returns True where |x|, rounded by the step next to the largest value, is beyond that value.

    >>> saturates(torch.tensor([6.0, 6.9, 7.0]), E2M1)
    tensor([False, False,  True])
    """
    steps = x.detach().float().abs() * (1.0 / fmt.largest_step)
    return steps.round_() > fmt.max_value / fmt.largest_step


def fake_quantize_minifloat(x: Tensor, scale: Tensor, inverse: Tensor, fmt: Minifloat) -> Tensor:
    """Casts with a scale and the straight-through gradient.

    Forward:  x̂ = scale · cast(x · inverse)

    Backward: ∂x̂/∂x = 0 where the element saturates, that is where |x · inverse|, rounded by the step next to the
    largest value, is beyond it; 1 elsewhere. Scales are constants.

    Args:
        x: float tensor of any shape.
        scale, inverse: float32, broadcastable to `x`; `inverse` is 1 / scale, in the rounding that the format asks for.
        fmt: the format of the elements.

    Returns:
        Tensor like `x`, in its dtype; the arithmetic is float32.

    >>> x = torch.tensor([0.3, -20.0], requires_grad=True)
    >>> y = fake_quantize_minifloat(x, torch.tensor(2.0), torch.tensor(0.5), E2M1)
    >>> y.sum().backward()
    >>> y.detach(), x.grad
    (tensor([  0., -12.]), tensor([1., 0.]))
    """
    y: Tensor = applied(_FakeQuantizeMinifloat, x, scale, inverse, fmt)
    return y


class _FakeQuantizeMinifloat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, inverse: Any, fmt: Any) -> Any:
        ctx.save_for_backward(x, inverse)
        ctx.fmt = fmt
        return round_to_minifloat(x.float() * inverse, fmt).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, inverse = ctx.saved_tensors
        return grad.masked_fill(saturates(x.float() * inverse, ctx.fmt), 0.0), None, None, None
