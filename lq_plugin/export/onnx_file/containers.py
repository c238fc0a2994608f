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
