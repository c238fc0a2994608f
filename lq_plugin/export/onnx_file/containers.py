"""Containers of quantized weights in ONNX: numbers of a standard type, and a scale for each block of them.

    w = (q - zero_point) · scale                          DequantizeLinear, with axis or block_size
    w = table[q]                                          Gather
    w = q · scale, for small floats                       `lq_plugin.export.onnx_file.minifloats`

| format | numbers | block |
|---|---|---|
| int | the levels: INT2, INT4, INT8, INT16 or UINT2 to UINT16 | of the granularity; two-level scales multiplied out |
| mx4, mx6, mx9 | the levels, INT4 or INT8 | 2 |
| mxint8, mxfp6_e2m3 | multiples of the smallest number, INT8 | 32 |
| mxfp8, mxfp6_e3m2 | FLOAT8E4M3FN or FLOAT8E5M2, with the scales in FLOAT8E8M0 | 32 |
| fp8 | FLOAT8E4M3FN or FLOAT8E5M2 | of the granularity; a square's scale for each of its rows |
| mxfp4, nvfp4 | as `fp4` says: INT8, UINT4 or FLOAT4E2M1 | 32, 16 |
| if4 | integers, and floats in halves, INT8 | 16 |
| sign, bwn, twn, seq:ternary | -1, 0, 1: INT2 | of the granularity |
| seq | -3, -1, 1, 3: INT4 | of the granularity |
| ttq, kmeans | an index, and the table | per tensor |

All of them are exact.
"""

from __future__ import annotations

from lq_plugin.errors import ExportError
from lq_plugin.export.onnx_file.minifloats import FLOATS
from lq_plugin.functional.minifloat import E2M1
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.registry import (
    Container as Container,
    FloatContainer as FloatContainer,
    Parts,
    format_code,
)

#: Groups of 2-bit weights that ONNX Runtime 1.32 has a kernel for; others take a hundred times as long.
_FAST_GROUPS = (128, 64, 32)


def container(spec: QuantSpec, parts: Parts, name: str, fp4: str = "int8") -> Container | FloatContainer:
    """Returns the exact container of a weight that `lq_plugin.export.codes.encode` took apart.

    Args:
        spec: of the weight.
        parts: of the weight.
        name: of the weight, for messages.
        fp4: see `Form`.

    Raises:
        ExportError: when ONNX has none.
    """
    values = {key: part.values.detach() for key, part in parts.items()}
    make, reason = format_code(spec).onnx, refusal(spec, values["codes"].shape[0])
    if make is None or reason is not None:
        raise ExportError(f"{name} ({spec}): {reason}")
    made = make(spec, values)
    if isinstance(made, FloatContainer) and (made.element not in FLOATS or (made.element == E2M1 and fp4 == "int8")):
        integers = made.as_integers()
        if integers is None:
            raise ExportError(f"{name} ({spec}): ONNX has no type for its numbers")
        return integers
    return made


def refusal(spec: QuantSpec, channels: int) -> str | None:
    """Returns why `container` refuses such weights of so many output channels, whatever their values; else None."""
    code = format_code(spec)
    if code.onnx is None:
        return f"format {spec.format_name!r} has no container in ONNX; use the packed file, or another format"
    return code.onnx_fault(spec, channels)


def for_float_kernels(weight: Container, bits: int, inputs: int, columns: int) -> tuple[Container, int, str | None]:
    """Returns a weight whose matrix products with floats runtimes compute rightly, its bits, and what has no kernel.

    Args:
        weight: integers, a scale for each channel or block.
        bits: of the type that is to hold it.
        inputs: of the product.
        columns: last dim of the weight as the file has it.
    """
    if bits == 2 and columns % 4:
        # ONNX Runtime 1.32 computes nonsense there: its fusion to MatMulNBits mixes up the columns.
        bits = 4
    if bits == 4 and inputs % 2:
        # OpenVINO 2026.4 computes nonsense there: from 5 rows on the last input has the weight of an earlier one.
        bits = 8
    if bits != 2 or weight.block in (0, *_FAST_GROUPS):
        return weight, bits, None
    size = next((size for size in _FAST_GROUPS if weight.block % size == 0), None)
    return (weight, bits, f"2-bit groups of {weight.block}") if size is None else (weight.in_blocks(size), bits, None)
