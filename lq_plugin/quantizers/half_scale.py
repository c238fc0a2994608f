"""Integers in blocks under a float16 scale: the grids of GGUF's types Q4_0, Q8_0, TQ1_0 and TQ2_0.

A file of llama.cpp holds, for each block of consecutive elements of a row, integers and one float16 number d:

| format | block | levels | d |
|---|---|---|---|
| q4_0 | 32 | -8..7 | the element of largest magnitude, with its sign, over -8 |
| q8_0 | 32 | -127..127 | the largest magnitude over 127 |
| tq1_0, tq2_0 | 256 | -1, 0, 1 | `mean`: the mean magnitude; `exact`: that of least squared error; `max`: the largest |

Both d and the levels are found here, and they are what the file holds: weights are trained on its numbers. Rounding is
by the float16 d; ggml rounds by the float32 number that d is rounded from, which can be one level off. `max` is what
ggml itself makes of a ternary block, right for one that is ternary already; of float weights it keeps a few alone.

Q4_0's d may be negative, so that its levels are -8..7 or -7..8 times |d|. Here the scale is |d|, and the zero point
0 or -1.

Sources: ggml's `quantize_row_q4_0_ref`, `quantize_row_q8_0_ref`, `quantize_row_tq2_0_ref` and their copies in the
package gguf; the mean magnitude: Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", 2024
(arXiv 2402.17764), eq. 1-3, there of a whole tensor.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lq_plugin.functional import twn
from lq_plugin.functional.affine import dequantize, quantize
from lq_plugin.functional.grouping import blocks, to_rows, unblocks
from lq_plugin.functional.trits import BLOCK, pack_trits, unpack_trits
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.quantizers.registry import Container, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.weight import WeightQuantizer

#: Of float16: the smallest and the largest positive number.
_SMALLEST, _LARGEST = 2.0**-24, 65504.0


def half_scale(scale: Tensor) -> Tensor:
    """Returns the nearest positive float16 numbers, as float32: a block of zeros has the smallest.

    >>> half_scale(torch.tensor([0.1, 0.0, 1e6]))
    tensor([9.9976e-02, 5.9605e-08, 6.5504e+04])
    """
    return scale.clamp(_SMALLEST, _LARGEST).half().float()


class Q8Quantizer(WeightQuantizer):
    """Weights in Q8_0."""

    def bounds_to_qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super().bounds_to_qparams(minimum, maximum)
        return half_scale(scale), zero_point


class Q4Quantizer(WeightQuantizer):
    """Weights in Q4_0."""

    def bounds_to_qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        scale = half_scale(torch.maximum(-minimum, maximum).float() / 8)
        return scale, torch.where(maximum > -minimum, -1.0, torch.zeros_like(scale))


class TernaryBlockQuantizer(Q8Quantizer):
    """Weights in TQ1_0 and TQ2_0."""

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.is_fixed or x is None or self.scale_rule == "max":
            return super().qparams(x)
        rows = to_rows(x.detach(), self.scale_shape)
        if self.scale_rule == "exact":
            scale = twn.ternary_scale(rows, twn.exact_threshold(rows))
        else:
            count = self.counts(x.device)
            scale = rows.float().abs().sum(1) / (rows.shape[1] if count is None else count.flatten())
        scale = half_scale(scale).reshape(self.scale_shape)
        return scale, torch.zeros_like(scale)

    @property
    def scale_rule(self) -> str:
        """The word for how d is found."""
        return next(iter(self.spec.format_options), "mean")


def half_bits(values: Tensor) -> Tensor:
    """Returns the bits of float16 numbers, int32.

    >>> half_bits(torch.tensor([1.0, -2.0]))
    tensor([15360, 49152], dtype=torch.int32)
    """
    return values.half().view(torch.int16).to(torch.int32) & 0xFFFF


def from_half_bits(bits: Tensor) -> Tensor:
    """Returns the float16 numbers of some bits, as float32.

    >>> from_half_bits(torch.tensor([15360, 49152], dtype=torch.int32))
    tensor([ 1., -2.])
    """
    return bits.to(torch.int16).view(torch.float16).float()


def _statistics(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    return quantizer.qparams(w)


def _encode(quantizer: WeightQuantizer, w: Tensor, scale: Tensor, zero_point: Tensor) -> Parts:
    """Returns codes and d as the file has them: code = level + 8, 127 or 1."""
    spec = quantizer.spec
    levels = quantize(w, scale, zero_point, spec.grid) - zero_point.to(torch.int32)
    if spec.grid.affine:
        negative = zero_point < 0
        levels, scale = torch.where(negative, -levels, levels), torch.where(negative, -scale, scale)
    codes = levels - spec.grid.quant_min
    return {"codes": Part(codes, spec.bit_width), "scale": Part(half_bits(scale), 16)}


def _encode_trits(quantizer: WeightQuantizer, w: Tensor, scale: Tensor, zero_point: Tensor) -> Parts:
    """Returns d and five levels a byte; a block of fewer elements is filled up with the level 0."""
    parts = _encode(quantizer, w, scale, zero_point)
    codes = parts["codes"].values.movedim(2, -1)
    whole = torch.nn.functional.pad(codes, (0, BLOCK - codes.shape[-1]), value=1)
    packed = pack_trits(whole).movedim(-1, 2)
    return parts | {"codes": Part(torch.zeros_like(parts["codes"].values), 0), "packed": Part(packed, 8)}


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    return dequantize(_codes(parts) + spec.grid.quant_min, from_half_bits(parts["scale"]), torch.zeros(()))


def _codes(parts: Values) -> Tensor:
    """Returns the codes, shaped like blocks."""
    if "packed" not in parts:
        return parts["codes"]
    found = unpack_trits(parts["packed"].movedim(2, -1)).movedim(-1, 2)
    return found[:, :, : parts["codes"].shape[2]]


def _container(spec: QuantSpec, values: Values) -> Container:
    """Returns the levels with a positive scale; those of Q4_0 with the zero point 0 or -1."""
    group = cast(PerGroup, spec.granularity)
    codes = _codes({**values, "codes": blocks(values["codes"], group)})
    levels = unblocks(codes, tuple(values["codes"].shape), group) + spec.grid.quant_min
    scale, size = from_half_bits(values["scale"]).squeeze(2), group.group_size
    if not spec.grid.affine:
        return Container(levels, spec.bit_width, True, scale, block=size)
    zero_point = -(scale < 0).to(torch.int32)
    of_each = zero_point.repeat_interleave(size, 1)[:, : levels.shape[1]]
    return Container(torch.where(of_each < 0, -levels - 1, levels), 4, True, scale.abs(), zero_point, size)


for _name, _kind in {
    "q4_0": Q4Quantizer,
    "q8_0": Q8Quantizer,
    "tq1_0": TernaryBlockQuantizer,
    "tq2_0": TernaryBlockQuantizer,
}.items():
    register_format(
        _name,
        FORMATS[_name],
        weight=_kind,
        storage=Storage(_encode_trits if _name == "tq1_0" else _encode, _decode, _statistics),
        onnx=_container,
        default_options="mean" if _kind is TernaryBlockQuantizer else "",
    )
