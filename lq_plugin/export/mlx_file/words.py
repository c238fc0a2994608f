"""Quantized weights as MLX holds them: words of 32 bits, scales, and biases.

    affine      w = scale · q + bias, q of b bits; the words of a row are one stream of bits, the lowest first
    mxfp4       E2M1 codes of 4 bits, an exponent E + 127 (uint8) for 32 of them
    mxfp8       E4M3 codes of 8 bits, an exponent for 32 of them
    nvfp4       E2M1 codes of 4 bits, an E4M3 scale (uint8) for 16 of them, without a scale above: nvfp4:unit

Symmetric levels from `quant_min` up become q = level - quant_min with bias = quant_min · scale; a zero point z makes it
(quant_min - z) · scale. The sum scale · q + bias is rounded, so that a value may be off by half a unit of the bias's
last place: 6e-8 of the group's range.

Source: `mlx.core.quantize` and `mlx.nn.QuantizedLinear`, which read all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lq_plugin.export.codes import encode
from lq_plugin.export.onnx_file.containers import container
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.quantizers.registry import Container

#: Bits of MLX's affine integers.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
#: Elements that share a scale and a bias, the largest first.
GROUPS = (128, 64, 32)
#: Modes of floats by format, with their bits, and the elements of a block.
FLOATS = {"mxfp4": ("mxfp4", 4, 32), "mxfp8_e4m3": ("mxfp8", 8, 32), "nvfp4": ("nvfp4", 4, 16)}


class Words(NamedTuple):
    """Weight as a file holds it.

    Args:
        arrays: `weight` uint32 `[C_out, C_in · bits / 32]`, `scales` and maybe `biases` `[C_out, C_in / group]`.
        group: elements that share a scale.
        bits: of an element.
        mode: of MLX.
    """

    arrays: dict[str, NDArray[Any]]
    group: int
    bits: int
    mode: str

    def settings(self) -> dict[str, Any]:
        """Returns what MLX's functions and `config.json` call these numbers."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


def group_of(spec: QuantSpec, columns: int) -> int | None:
    """Returns the elements that share a scale in a file, for rows of so many; None: no group of MLX fits.

    >>> group_of(QuantSpec.parse("int4 per_channel"), 192), group_of(QuantSpec.parse("int4 group16"), 192)
    (64, None)
    """
    size = spec.granularity.group_size if isinstance(spec.granularity, PerGroup) else columns
    return next((group for group in GROUPS if size % group == 0 and columns % group == 0), None)


def affine_bits(bits: int) -> int:
    """Returns the bits of MLX's integers that hold those of a spec."""
    return next(known for known in AFFINE_BITS if known >= bits)


def stored(quantizer: Any, weight: Any) -> Words:
    """Returns a weight in MLX's layout.

    Args:
        quantizer: calibrated, of a spec that the target holds.
        weight: `[C_out, C_in]`.
    """
    spec: QuantSpec = quantizer.spec
    parts = encode(quantizer, weight)
    if spec.format_name in FLOATS:
        mode, bits, size = FLOATS[spec.format_name]
        codes = parts["codes"].values.cpu().numpy()
        scales = parts["scale" if mode == "nvfp4" else "exponent"].values.squeeze(2).cpu().numpy()
        return Words({"weight": packed(codes, bits), "scales": scales.astype(np.uint8)}, size, bits, mode)
    columns = weight.shape[1]
    group = group_of(spec, columns)
    assert group is not None
    held = container(spec, parts, quantizer.name)
    assert isinstance(held, Container)  # the formats that the target takes are integers in ONNX
    assert held.scale is not None
    lowest = spec.grid.quant_min if spec.has_grid else -(2 ** (held.bits - 1))
    bits = affine_bits(spec.bit_width if spec.has_grid else held.bits)
    of_groups = _for_groups(held.scale, held.block, group, weight.shape)
    zero = 0.0 if held.zero_point is None else _for_groups(held.zero_point, held.block, group, weight.shape)
    biases = ((lowest - zero) * of_groups).astype(np.float32)
    codes = held.q.cpu().numpy() - lowest
    return Words({"weight": packed(codes, bits), "scales": of_groups, "biases": biases}, group, bits, "affine")


def _for_groups(values: Any, block: int, group: int, shape: Any) -> NDArray[np.float32]:
    """Returns a value for each group: repeated where more elements share it."""
    rows, columns = shape
    found = values.detach().float().cpu().numpy()
    found = found.reshape(-1, 1) if not block else found.repeat(block // group, axis=1)
    whole: NDArray[np.float32] = np.broadcast_to(found, (rows, columns // group)) if not block else found
    return np.array(whole[:, : columns // group], np.float32)


def packed(codes: NDArray[Any], bits: int) -> NDArray[np.uint32]:
    """Returns rows of integers as words: one stream of bits a row, the lowest bit of the first number first.

    Args:
        codes: 0..2^bits - 1, `[rows, columns]`; the bits of a row fill whole words.
        bits: of each.

    >>> packed(np.arange(8).reshape(1, 8), 4)
    array([[1985229328]], dtype=uint32)
    """
    planes = np.unpackbits(codes.astype(np.uint8)[..., None], axis=2, count=bits, bitorder="little")
    stream = np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little")
    words: NDArray[np.uint32] = stream.view("<u4").astype(np.uint32)
    return words
