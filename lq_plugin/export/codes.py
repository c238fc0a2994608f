"""What a quantized weight is made of: whole numbers of few bits, and a few float numbers.

`encode` takes a weight apart, `decode` puts it together, bit for bit. Every format stores exactly what
`lq_plugin.model.measure.cost` counts for it:

| format | codes (bits an element) | beside them |
|---|---|---|
| int | level - quant_min (b) | scale; zero point - quant_min (b), where affine |
| int, integer scales | the same | scale - 1 (M), the float scale above |
| mx4, mx6, mx9 | level + 2^m - 1 (m + 1) | E + 127 (8) a block, τ (1) a pair |
| mxfp*, mxint8 | sign, index of the magnitude | E + 127 (8) a block |
| nvfp4 | the same | index of the E4M3 scale (8) a block, the tensor's scale |
| sign, bwn | 1 for +1 (1) | bwn: scale |
| twn, ttq | 0, 1, 2 for -, 0, + (2) | one or two scales |
| kmeans | index (b) | the centroids |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.functional.affine import quantize
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.minifloat import E2M1, E4M3, Minifloat, round_to_minifloat
from lq_plugin.functional.mx import mx_exponents, step_of
from lq_plugin.functional.nvfp4 import nvfp4_scales, nvfp4_tensor_scale
from lq_plugin.functional.ocp_mx import ELEMENTS, mx_scale, power_of_two
from lq_plugin.functional.twn import ternary_signs
from lq_plugin.intent.spec import MX_FORMATS, PerGroup, QuantSpec
from lq_plugin.quantizers import WeightQuantizer, make_weight_quantizer
from lq_plugin.quantizers.blockwise import element_and_mode
from lq_plugin.quantizers.packed import PackedWeightQuantizer


@dataclass(frozen=True)
class Part:
    """A tensor to be stored.

    Args:
        values: whole numbers, or float32 numbers.
        bits: of each whole number; None: float.
    """

    values: Tensor
    bits: int | None = None


Parts = dict[str, Part]
Values = Mapping[str, Tensor]
#: Sliced along dim 0 where it is as long as the weight.
Statistics = tuple[Tensor, ...]


def encode(quantizer: Any, weight: Tensor) -> Parts:
    """The parts of a weight as its quantizer maps it in evaluation mode.

    Args:
        quantizer: calibrated.
        weight: `[C_out, C_in / groups, *kernel]`.

    Raises:
        ExportError: for what is evaluated with float weights, or was read from a packed file.
    """
    return encode_rows(quantizer, weight, statistics(quantizer, weight))


def statistics(quantizer: Any, weight: Tensor) -> Statistics:
    """What the parts of some rows take from the whole weight: small, but for the indices of a codebook.

    Raises:
        ExportError: see `encode`.
    """
    if isinstance(quantizer, PackedWeightQuantizer):
        raise ExportError(
            f"{quantizer.name} was read from a packed file, which holds its values and not its scales as parameters: "
            "export the model that it was packed from, or its checkpoint (lq_plugin.load_checkpoint)"
        )
    with torch.no_grad():
        return _FORMATS[quantizer.spec.format_name].statistics(
            quantizer, blocks(weight.detach().float(), quantizer.spec.granularity)
        )


def encode_rows(quantizer: Any, weight: Tensor, found: Statistics, rows: slice = slice(None)) -> Parts:
    """The parts of some rows of a weight; what is one for the whole weight has size 1 along dim 0.

    Args:
        quantizer: calibrated.
        weight: the whole one.
        found: its `statistics`.
        rows: output channels.
    """
    some, granularity = weight.detach()[rows].float(), quantizer.spec.granularity
    mine = tuple(value[rows] if len(value) == len(weight) else value for value in found)
    with torch.no_grad():
        parts = _FORMATS[quantizer.spec.format_name].encode(quantizer, blocks(some, granularity), *mine)
        # Without what pads a ragged group.
        codes = unblocks(parts["codes"].values, tuple(some.shape), granularity)
    return parts | {"codes": Part(codes.reshape(some.shape), parts["codes"].bits)}


@functools.lru_cache(256)
def layout(spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Shape and bits of each part of a weight `[C_out, ...]`, as `encode` makes them; None for bits: float32.

    >>> layout(QuantSpec.parse("int4 group16"), (8, 40))
    {'codes': ((8, 40), 4), 'scale': ((8, 3, 1), None)}

    Raises:
        ExportError: a spec whose weights are not stored.
    """
    if spec.format_name not in _FORMATS:
        raise ExportError(f"'{spec}' is no format of weights")
    rows = 1 if shape[0] == 1 else 2
    probe = torch.zeros(rows, *shape[1:])
    parts = encode(make_weight_quantizer(spec, "weight", tuple(probe.shape)), probe)
    return {
        key: ((shape[0] if part.values.shape[0] == rows else part.values.shape[0], *part.values.shape[1:]), part.bits)
        for key, part in parts.items()
    }


def any_code_is_finite(spec: QuantSpec) -> bool:
    """Whether every code decodes to a finite value where the scales are finite."""
    return spec.format_name in ("int", "sign", "bwn", "kmeans")


def nothing_stored(spec: QuantSpec) -> str | None:
    """Why `encode` refuses such weights, whatever their values; None: it does not.

    >>> nothing_stored(QuantSpec.parse("sign:float_eval stochastic")), nothing_stored(QuantSpec.parse("sign"))
    ('it is evaluated with float weights, there is nothing to store', None)
    """
    return (
        "it is evaluated with float weights, there is nothing to store" if "float_eval" in spec.format_options else None
    )


def decode(spec: QuantSpec, shape: tuple[int, ...], parts: Values) -> Tensor:
    """The weight `[C_out, C_in / groups, *kernel]`, float32, of values by name (whole numbers int32)."""
    values = _FORMATS[spec.format_name].decode(spec, {**parts, "codes": blocks(parts["codes"], spec.granularity)})
    return unblocks(values, shape, spec.granularity)


def _statistics_of_int(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    scale, zero_point = quantizer.qparams(w)
    if (levels := _integer_scales(quantizer.spec)) is None:
        return scale, zero_point
    per_channel = cast(PerGroup, quantizer.spec.granularity).coarse == "channel"
    coarse, whole = _two_levels(quantizer.name, scale, levels, per_channel)
    # A scale is their product. They are a sixteenth of the weight each, or more.
    return whole, coarse, *([zero_point] if quantizer.spec.grid.affine else [])


def _encode_int(quantizer: WeightQuantizer, w: Tensor, *found: Tensor) -> Parts:
    spec, grid = quantizer.spec, quantizer.spec.grid
    levels = _integer_scales(spec)
    scale = found[0] if levels is None else found[0] * found[1]
    zero_point = found[-1] if levels is None or grid.affine else torch.zeros(())
    parts = {"codes": Part(quantize(w, scale, zero_point, grid).sub_(grid.quant_min), spec.bit_width)}
    if grid.affine:
        parts["zero_point"] = Part(zero_point.to(torch.int32) - grid.quant_min, spec.bit_width)
    if levels is not None:
        return parts | {"scale": Part(found[0] - 1, levels), "coarse": Part(found[1])}
    return parts | {"scale": Part(scale)}


def _decode_int(spec: QuantSpec, parts: Values) -> Tensor:
    scale = parts["scale"]
    if _integer_scales(spec) is not None:
        scale = (scale + 1) * parts["coarse"]
    q = parts["codes"] + spec.grid.quant_min
    if "zero_point" in parts:
        q = q - (parts["zero_point"] + spec.grid.quant_min)
    return q * scale


def _integer_scales(spec: QuantSpec) -> int | None:
    return spec.granularity.scale_bits if isinstance(spec.granularity, PerGroup) else None


def _two_levels(name: str, scale: Tensor, bits: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """γ and the whole numbers whose products are the scales, bit for bit.

    The largest scale is γ · (2^M - 1), rounded once, so that γ is the quotient or a neighbour of it.
    """
    dims = list(range(1 if per_channel else 0, scale.ndim))
    guess = scale.amax(dims, keepdim=True) / (2**bits - 1)
    for direction in (guess, torch.full_like(guess, torch.inf), torch.zeros_like(guess)):
        guess_here = torch.nextafter(guess, direction)
        whole = (scale / guess_here).round()
        if torch.equal(whole * guess_here, scale):
            return guess_here, whole.to(torch.int32)
    raise ExportError(f"{name}: its scales are no whole multiples of one float scale; calibrate it again")


def _encode_mx(quantizer: WeightQuantizer, w: Tensor) -> Parts:
    m = quantizer.spec.bit_width - 1
    exponent, shift = mx_exponents(w)
    codes = quantize(w, step_of(exponent, shift, m), torch.zeros(()), quantizer.spec.grid) + 2**m - 1
    return {"codes": Part(codes, m + 1), "exponent": Part(exponent + 127, 8), "shift": Part(shift, 1)}


def _decode_mx(spec: QuantSpec, parts: Values) -> Tensor:
    m = spec.bit_width - 1
    return (parts["codes"] - 2**m + 1) * step_of(parts["exponent"] - 127, parts["shift"], m)


def _encode_ocp(quantizer: WeightQuantizer, w: Tensor) -> Parts:
    element, mode = element_and_mode(quantizer.spec)
    scale = mx_scale(w, element, mode)
    codes = _minifloat_codes(w * scale.reciprocal(), element)
    return {"codes": Part(codes, element.bit_width), "exponent": Part(torch.frexp(scale).exponent + 126, 8)}


def _decode_ocp(spec: QuantSpec, parts: Values) -> Tensor:
    return _minifloat_values(parts["codes"], ELEMENTS[spec.format_name]) * power_of_two(parts["exponent"] - 127)


def _encode_nvfp4(quantizer: WeightQuantizer, w: Tensor, tensor_scale: Tensor) -> Parts:
    block, _ = nvfp4_scales(w, tensor_scale)
    codes = _minifloat_codes(w * (tensor_scale.reciprocal() / block), E2M1)
    return {
        "codes": Part(codes, 4),
        "scale": Part(_minifloat_codes(block, E4M3), 8),
        "tensor_scale": Part(tensor_scale),
    }


def _decode_nvfp4(spec: QuantSpec, parts: Values) -> Tensor:
    return _minifloat_values(parts["codes"], E2M1) * (_minifloat_values(parts["scale"], E4M3) * parts["tensor_scale"])


def _minifloat_codes(x: Tensor, fmt: Minifloat) -> Tensor:
    """Sign in the highest bit, index of the magnitude below: the bits of the format itself."""
    value = round_to_minifloat(x, fmt)
    index = torch.searchsorted(fmt.values().to(x.device), value.abs().contiguous())
    return (index + (value.signbit() << (fmt.bit_width - 1))).to(torch.int32)


def _minifloat_values(codes: Tensor, fmt: Minifloat) -> Tensor:
    half = 1 << (fmt.bit_width - 1)
    magnitude = fmt.values().to(codes.device)[codes.long() % half]
    return torch.where(codes >= half, -magnitude, magnitude)


def _statistics_of_sign(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    if (reason := nothing_stored(quantizer.spec)) is not None:
        raise ExportError(f"{quantizer.name} ({quantizer.spec}): {reason}")
    return () if quantizer.spec.format_name == "sign" else (quantizer.qparams(w)[0],)


def _encode_binary(quantizer: WeightQuantizer, w: Tensor, *scale: Tensor) -> Parts:
    return {"codes": Part((w >= quantizer.spec.threshold).to(torch.int32), 1)} | dict(
        zip(("scale",), map(Part, scale), strict=False)
    )


def _decode_binary(spec: QuantSpec, parts: Values) -> Tensor:
    return (2.0 * parts["codes"] - 1.0) * parts.get("scale", torch.ones(()))


def _encode_twn(quantizer: Any, w: Tensor, threshold: Tensor, scale: Tensor) -> Parts:
    return {"codes": Part(ternary_signs(w, threshold).to(torch.int32) + 1, 2), "scale": Part(scale)}


def _decode_twn(spec: QuantSpec, parts: Values) -> Tensor:
    return (parts["codes"] - 1) * parts["scale"]


def _encode_ttq(quantizer: Any, w: Tensor, threshold: Tensor, positive: Tensor, negative: Tensor) -> Parts:
    codes = ternary_signs(w, threshold).to(torch.int32) + 1
    return {"codes": Part(codes, 2), "positive": Part(positive), "negative": Part(negative)}


def _decode_ttq(spec: QuantSpec, parts: Values) -> Tensor:
    signs = parts["codes"] - 1
    return torch.where(signs > 0, parts["positive"], torch.where(signs < 0, -parts["negative"], 0.0))


def _statistics_of_kmeans(quantizer: Any, w: Tensor) -> Statistics:
    return quantizer.indices.view(w.shape), quantizer.centroids.detach()


def _encode_kmeans(quantizer: Any, w: Tensor, indices: Tensor, centroids: Tensor) -> Parts:
    return {"codes": Part(indices.to(torch.int32), quantizer.spec.bit_width), "centroids": Part(centroids)}


def _decode_kmeans(spec: QuantSpec, parts: Values) -> Tensor:
    centroids, codes = parts["centroids"], parts["codes"]
    return centroids.gather(1, codes.reshape(len(centroids), -1).long()).reshape(codes.shape)


def _none(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    return ()


class _Format(NamedTuple):
    """`statistics` of the whole weight's blocks; `encode` makes parts of some rows' blocks and theirs; `decode` the
    blocks of parts."""

    statistics: Callable[[Any, Tensor], Statistics]
    encode: Callable[..., Parts]
    decode: Callable[[QuantSpec, Values], Tensor]


_FORMATS: dict[str, _Format] = {
    "int": _Format(_statistics_of_int, _encode_int, _decode_int),
    **dict.fromkeys(MX_FORMATS, _Format(_none, _encode_mx, _decode_mx)),
    **dict.fromkeys(ELEMENTS, _Format(_none, _encode_ocp, _decode_ocp)),
    "nvfp4": _Format(
        lambda _, w: (nvfp4_tensor_scale(torch.maximum(w.amax(), -w.amin())).reshape(1),), _encode_nvfp4, _decode_nvfp4
    ),
    "sign": _Format(_statistics_of_sign, _encode_binary, _decode_binary),
    "bwn": _Format(_statistics_of_sign, _encode_binary, _decode_binary),
    "twn": _Format(lambda quantizer, w: quantizer.threshold_and_scale(w), _encode_twn, _decode_twn),
    "ttq": _Format(lambda quantizer, w: (quantizer.threshold(w), *quantizer.scales()), _encode_ttq, _decode_ttq),
    "kmeans": _Format(_statistics_of_kmeans, _encode_kmeans, _decode_kmeans),
}
