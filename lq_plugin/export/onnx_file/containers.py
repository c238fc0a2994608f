"""How a quantized weight is said in ONNX: whole numbers in a standard integer type, a scale for each block of them.

    w = (q - zero_point) · scale                          DequantizeLinear, with axis or block_size
    w = table[q]                                          Gather

| format | whole numbers | block |
|---|---|---|
| int | the levels: INT2, INT4, INT8, INT16 or UINT2 to UINT16 | of the granularity; two-level scales multiplied out |
| mx4, mx6, mx9 | the levels, INT4 or INT8 | 2 |
| mxint8; mxfp4, nvfp4; mxfp6 | value · 64; · 2; · 8 (E2M3) or · 16 (E3M2): INT8, INT16 for E3M2 | 32, 16 |
| sign, bwn, twn | -1, 0, 1: INT2 | of the granularity |
| ttq, kmeans | an index, and the table | per tensor |

All of them are exact. MXFP8 has none: its values need 18 bits as whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.export.codes import Parts
from lq_plugin.functional.minifloat import E4M3
from lq_plugin.functional.mx import step_of
from lq_plugin.functional.ocp_mx import ELEMENTS, power_of_two
from lq_plugin.intent.spec import MX_FORMATS, PerGroup, PerTensor, QuantSpec

#: What an OCP element is multiplied with to be a whole number.
_WHOLE = {"mxint8": 64, "mxfp4": 2, "mxfp6_e2m3": 8, "mxfp6_e3m2": 16}


@dataclass(frozen=True)
class Container:
    """A weight as whole numbers and what turns them into real ones.

    Args:
        q: int32, `[C_out, C_in / groups, *kernel]`.
        bits, signed: of the smallest integer type that holds them: 2, 4, 8 or 16 bits.
        scale: float32 `[]`, `[C_out]`, or, with a block, `[C_out, blocks, *kernel]`; None with a table.
        zero_point: int32 like the scale; None: 0.
        block: elements along dim 1 that share a scale; 0: all.
        table: float32, indexed by `q`.
    """

    q: Tensor
    bits: int
    signed: bool
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    block: int = 0
    table: Tensor | None = None

    def in_blocks(self, size: int) -> Container:
        """The same weight in smaller blocks, of a size that divides the one they have.

        >>> whole = Container(torch.zeros(1, 6, dtype=torch.int32), 2, True, torch.tensor([[0.5, 2.0]]), block=4)
        >>> whole.in_blocks(2).scale
        tensor([[0.5000, 0.5000, 2.0000]])
        """
        count = -(-self.q.shape[1] // size)

        def repeated(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat_interleave(self.block // size, 1)[:, :count]

        return replace(self, scale=repeated(self.scale), zero_point=repeated(self.zero_point), block=size)


def container(spec: QuantSpec, parts: Parts, name: str) -> Container:
    """The exact container of a weight that `lq_plugin.export.codes.encode` took apart.

    Raises:
        ExportError: when ONNX has none.
    """
    values = {key: part.values.detach() for key, part in parts.items()}
    codes = values["codes"]
    kind = spec.format_name
    if kind == "int":
        return _integer(spec, values)
    if kind in MX_FORMATS:
        m = spec.bit_width - 1
        steps = step_of(values["exponent"] - 127, values["shift"], m)[:, :, ::2].flatten(1, 2)
        pairs = -(-codes.shape[1] // 2)
        return Container(codes - 2**m + 1, 4 if m < 4 else 8, True, steps[:, :pairs], block=2)
    if kind in _WHOLE:
        element, factor = ELEMENTS[kind], _WHOLE[kind]
        scale = power_of_two(values["exponent"] - 127).squeeze(2) / factor
        return Container(
            _whole(codes, element.values(), factor), 16 if kind == "mxfp6_e3m2" else 8, True, scale, block=32
        )
    if kind == "nvfp4":
        scale = E4M3.values()[values["scale"].long()].squeeze(2) * values["tensor_scale"] / 2
        return Container(_whole(codes, ELEMENTS["mxfp4"].values(), 2), 8, True, scale, block=16)
    if kind in ("sign", "bwn", "twn"):
        q = codes - 1 if kind == "twn" else 2 * codes - 1
        scale, block = _scale(spec, values.get("scale", torch.ones(1)))
        return Container(q, 2, True, scale, block=block)
    if kind == "ttq" and values["positive"].numel() == 1:
        table = torch.cat([-values["negative"].reshape(1), torch.zeros(1), values["positive"].reshape(1)])
        return Container(codes, 8, False, table=table)
    if kind == "kmeans" and len(values["centroids"]) == 1:
        return Container(codes, 8, False, table=values["centroids"][0])
    raise ExportError(f"{name} ({spec}): {_no_container(kind)}")


def refusal(spec: QuantSpec, channels: int) -> str | None:
    """Why `container` refuses such weights of so many output channels, whatever their values; None: it does not."""
    kind = spec.format_name
    if kind in ("ttq", "kmeans"):
        return _no_container(kind) if channels > 1 and not isinstance(spec.granularity, PerTensor) else None
    held = kind in ("int", "nvfp4", "sign", "bwn", "twn") or kind in MX_FORMATS or kind in _WHOLE
    return None if held else _no_container(kind)


def _no_container(kind: str) -> str:
    reason = (
        "tables for single channels" if kind in ("ttq", "kmeans") else "whole numbers of 16 bits that hold its values"
    )
    return f"ONNX has no {reason}; use the packed file, or another format"


def _integer(spec: QuantSpec, values: dict[str, Tensor]) -> Container:
    grid = spec.grid
    whole = values["scale"]
    if "coarse" in values:
        whole = (whole + 1) * values["coarse"]
    scale, block = _scale(spec, whole)
    zero_point = None
    if "zero_point" in values:
        zero_point = _scale(spec, values["zero_point"] + grid.quant_min)[0]
    bits = next(bits for bits in (2, 4, 8, 16) if spec.bit_width <= bits)
    return Container(values["codes"] + grid.quant_min, bits, grid.signed, scale, zero_point, block)


def _scale(spec: QuantSpec, scale: Tensor) -> tuple[Tensor, int]:
    """A scale in ONNX's shape, and its block."""
    if isinstance(spec.granularity, PerGroup):
        return scale.squeeze(2), spec.granularity.group_size
    return (scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)), 0


def _whole(codes: Tensor, magnitudes: Tensor, factor: int) -> Tensor:
    half = len(magnitudes)
    # A format whose largest codes are no values (E4M3's NaN) has fewer magnitudes than codes.
    while half & (half - 1):
        half += 1
    value = (magnitudes * factor).round().to(torch.int32)[codes.long() % half]
    return torch.where(codes >= half, -value, value)
