"""Integers: the levels `quant_min..quant_max` under a float scale, or under integer scales for short vectors.

`INTEGER_STORAGE` and `integer_container` serve every format whose values are `(level - zero_point) · scale`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.functional.affine import quantize
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.dynamic import DynamicActivationQuantizer
from lq_plugin.quantizers.learned_ranges import learned_activation, learned_weight
from lq_plugin.quantizers.registry import Container, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.vector import VectorActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer


def integer_weight(spec: QuantSpec, name: str, shape: tuple[int, ...]) -> WeightQuantizer:
    """Returns the quantizer of an integer weight: with a learned range, or with one from statistics.

    Args:
        spec: of the weight.
        name: for messages.
        shape: of the weight.
    """
    return (learned_weight(spec) or WeightQuantizer)(spec, name, shape)


def integer_activation(spec: QuantSpec, name: str, channels: int, channel_axis: int) -> ActivationQuantizer:
    """Returns the quantizer of an integer activation, by its range and granularity.

    Args:
        spec: of the activation.
        name: for messages.
        channels: size of the channel axis.
        channel_axis: axis of the channels.
    """
    if spec.dynamic:
        return DynamicActivationQuantizer(spec, name, channels, channel_axis)
    plain = VectorActivationQuantizer if isinstance(spec.granularity, PerGroup) else ActivationQuantizer
    return (learned_activation(spec) or plain)(spec, name, channels, channel_axis)


def integer_container(spec: QuantSpec, values: Values) -> Container:
    """Returns the levels in the smallest integer type of ONNX, with their scales; integer scales multiplied out."""
    grid, scale = spec.grid, values["scale"]
    if "coarse" in values:
        scale = (scale + 1) * values["coarse"]
    scale, block = onnx_scale(spec, scale)
    zero_point = None
    if "zero_point" in values:
        zero_point = onnx_scale(spec, values["zero_point"] + grid.quant_min)[0]
    bits = next(bits for bits in (2, 4, 8, 16) if spec.bit_width <= bits)
    return Container(values["codes"] + grid.quant_min, bits, grid.signed, scale, zero_point, block)


def onnx_scale(spec: QuantSpec, scale: Tensor) -> tuple[Tensor, int]:
    """Returns a scale in ONNX's shape, and the elements along dim 1 that share it (0: all)."""
    if isinstance(spec.granularity, PerGroup):
        return scale.squeeze(2), spec.granularity.group_size
    return (scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)), 0


def _statistics(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    scale, zero_point = quantizer.qparams(w)
    if (bits := _scale_bits(quantizer.spec)) is None:
        return scale, zero_point
    per_channel = cast(PerGroup, quantizer.spec.granularity).coarse == "channel"
    coarse, multiples = _two_levels(quantizer.name, scale, bits, per_channel)
    # A scale is their product. They are a sixteenth of the weight each, or more.
    return multiples, coarse, *([zero_point] if quantizer.spec.grid.affine else [])


def _encode(quantizer: WeightQuantizer, w: Tensor, *found: Tensor) -> Parts:
    spec, grid = quantizer.spec, quantizer.spec.grid
    bits = _scale_bits(spec)
    scale = found[0] if bits is None else found[0] * found[1]
    zero_point = found[-1] if bits is None or grid.affine else torch.zeros(())
    parts = {"codes": Part(quantize(w, scale, zero_point, grid).sub_(grid.quant_min), spec.bit_width)}
    if grid.affine:
        parts["zero_point"] = Part(zero_point.to(torch.int32) - grid.quant_min, spec.bit_width)
    if bits is not None:
        return parts | {"scale": Part(found[0] - 1, bits), "coarse": Part(found[1])}
    return parts | {"scale": Part(scale)}


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    scale = parts["scale"]
    if _scale_bits(spec) is not None:
        scale = (scale + 1) * parts["coarse"]
    q = parts["codes"] + spec.grid.quant_min
    if "zero_point" in parts:
        q = q - (parts["zero_point"] + spec.grid.quant_min)
    return q * scale


def _scale_bits(spec: QuantSpec) -> int | None:
    return spec.granularity.scale_bits if isinstance(spec.granularity, PerGroup) else None


def _two_levels(name: str, scale: Tensor, bits: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Returns γ and the integers whose products are the scales, bit for bit.

    The largest scale is γ · (2^M - 1), rounded once, so that γ is the quotient or a neighbour of it.
    """
    dims = list(range(1 if per_channel else 0, scale.ndim))
    guess = scale.amax(dims, keepdim=True) / (2**bits - 1)
    for direction in (guess, torch.full_like(guess, torch.inf), torch.zeros_like(guess)):
        guess_here = torch.nextafter(guess, direction)
        multiples = (scale / guess_here).round()
        if torch.equal(multiples * guess_here, scale):
            return guess_here, multiples.to(torch.int32)
    raise ExportError(f"{name}: its scales are no integer multiples of one float scale; calibrate it again")


INTEGER_STORAGE = Storage(_encode, _decode, _statistics, finite_codes=True)
register_format(
    "int",
    FORMATS["int"],
    weight=integer_weight,
    activation=integer_activation,
    storage=INTEGER_STORAGE,
    onnx=integer_container,
)
