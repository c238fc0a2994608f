"""Containers of quantized weights in ONNX: integers of a standard type, and a scale for each block of them.

    w = (q - zero_point) · scale                          DequantizeLinear, with axis or block_size
    w = table[q]                                          Gather

| format | integers | block |
|---|---|---|
| int | the levels: INT2, INT4, INT8, INT16 or UINT2 to UINT16 | of the granularity; two-level scales multiplied out |
| mx4, mx6, mx9 | the levels, INT4 or INT8 | 2 |
| mxint8; mxfp4, nvfp4; mxfp6 | value · 64; · 2; · 8 (E2M3) or · 16 (E3M2): INT8, INT16 for E3M2 | 32, 16 |
| sign, bwn, twn | -1, 0, 1: INT2 | of the granularity |
| ttq, kmeans | an index, and the table | per tensor |

All of them are exact. MXFP8 has none: its values need 18 bits as integers.
"""

from __future__ import annotations

from lq_plugin.errors import ExportError
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.registry import Container as Container, Parts, format_code


def container(spec: QuantSpec, parts: Parts, name: str) -> Container:
    """Returns the exact container of a weight that `lq_plugin.export.codes.encode` took apart.

    Args:
        spec: of the weight.
        parts: of the weight.
        name: of the weight, for messages.

    Raises:
        ExportError: when ONNX has none.
    """
    values = {key: part.values.detach() for key, part in parts.items()}
    make, reason = format_code(spec).onnx, refusal(spec, values["codes"].shape[0])
    if make is None or reason is not None:
        raise ExportError(f"{name} ({spec}): {reason}")
    return make(spec, values)


def refusal(spec: QuantSpec, channels: int) -> str | None:
    """Returns why `container` refuses such weights of so many output channels, whatever their values; else None."""
    code = format_code(spec)
    if code.onnx is None:
        return f"format {spec.format_name!r} has no container in ONNX; use the packed file, or another format"
    return code.onnx_fault(spec, channels)
