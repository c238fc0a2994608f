"""Bytes of quantized weights in GGUF's types, from the parts that `lq_plugin.export.codes.encode` makes of them.

| type | elements | bytes of a block |
|---|---|---|
| Q4_0 | 32 | d (float16), 16 bytes: byte j has code j in its low half and code j + 16 in its high half |
| Q8_0 | 32 | d, 32 levels (int8) |
| TQ2_0 | 256 | 64 bytes, of each 32 the codes of 4 elements that lie 32 apart, 2 bits each; d |
| TQ1_0 | 256 | 52 bytes (`lq_plugin.functional.trits`); d |
| MXFP4 | 32 | the exponent, 16 bytes as those of Q4_0 |
| NVFP4 | 64 | four E4M3 scales, then 8 bytes for each 16 elements as those of Q4_0; the tensor's scale is a tensor |

Source: `ggml-common.h` and `ggml-quants.c` of ggml, and their copies in the package gguf, which reads all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lq_plugin.export.codes import encode
from lq_plugin.export.gguf_file.types import TYPES
from lq_plugin.intent.spec import QuantSpec

Bytes = NDArray[np.uint8]


class StoredWeight(NamedTuple):
    """Weight as a file holds it.

    Args:
        type: name in `gguf.GGMLQuantizationType`.
        rows: bytes of each row, `[C_out, bytes]`.
        scale: that the whole tensor is multiplied by; None: 1.
    """

    type: str
    rows: Bytes
    scale: float | None = None


def stored(quantizer: Any, weight: Any) -> StoredWeight:
    """Returns a weight in the type of its format.

    Args:
        quantizer: calibrated, of one of the formats in `TYPES`.
        weight: `[C_out, C_in]`, whole blocks a row.
    """
    spec: QuantSpec = quantizer.spec
    parts = {key: part.values.cpu().numpy() for key, part in encode(quantizer, weight).items()}
    rows = len(weight)
    kind = TYPES[spec.format_name]
    blocks = weight.shape[1] // kind.elements
    codes = parts["codes"].astype(np.uint8).reshape(rows, blocks, -1)
    match kind.name:
        case "Q4_0":
            pieces = [_half(parts["scale"]), _nibbles(codes, 32)]
        case "Q8_0":
            pieces = [_half(parts["scale"]), (parts["codes"] + spec.grid.quant_min).astype(np.int8).view(np.uint8)]
        case "TQ2_0":
            quarters = codes.reshape(rows, -1, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
            pieces = [np.bitwise_or.reduce(quarters, axis=2), _half(parts["scale"])]
        case "TQ1_0":
            pieces = [parts["packed"].astype(np.uint8), _half(parts["scale"])]
        case "MXFP4":
            pieces = [parts["exponent"].astype(np.uint8), _nibbles(codes, 32)]
        case _:
            pieces = [parts["scale"].astype(np.uint8), _nibbles(codes, 16)]
    joined = np.concatenate([piece.reshape(rows, blocks, -1) for piece in pieces], axis=2)
    above = float(parts["tensor_scale"].item()) if "tensor_scale" in parts else 1.0
    return StoredWeight(kind.name, joined.reshape(rows, -1), None if above == 1 else above)


def _half(bits: NDArray[Any]) -> Bytes:
    """Returns the two bytes of float16 numbers, the lower one first."""
    return np.ascontiguousarray(bits.astype("<u2")).view(np.uint8)


def _nibbles(codes: Bytes, size: int) -> Bytes:
    """Returns two codes a byte: those that lie half of `size` elements apart."""
    halves = codes.reshape(len(codes), -1, 2, size // 2)
    low, high = halves[:, :, 0], halves[:, :, 1]
    paired: Bytes = low | (high << np.uint8(4))
    return paired
