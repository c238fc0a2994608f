"""Options and packages of ONNX files. Nothing here imports torch or onnx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lq_plugin.errors import did_you_mean
from lq_plugin.export.request import Option, flag_fault

#: Needed to write a file.
PACKAGES: tuple[str, ...] = ("onnx", "onnxscript")
#: Bits that the smallest integer type of a file may have.
SMALLEST = (2, 4, 8)
#: Numbers of a file that stand for 4-bit floats, see `Form`.
FP4 = ("int8", "uint4", "float4")
#: Specs that files hold, the usual ones first. TensorRT's hold a part of them.
TAKES: dict[str, tuple[str, ...]] = {
    "weight": ("int8 per_channel", "int4 per_channel", "int4 group64", "int4 group128", "int2 per_channel", "int8"),
    "input": ("uint8 affine", "int8", "uint8", "uint7", "uint16 affine", "int16", "uint8 affine dynamic", "fp8"),
}


def _smallest_fault(smallest: Any) -> str | None:
    return None if smallest in SMALLEST else f"smallest is 2, 4 or 8 bits, got {smallest!r}"


def _fp4_fault(fp4: Any) -> str | None:
    return (
        None if fp4 in FP4 else f"fp4 is {', '.join(FP4[:-1])} or {FP4[-1]}, got {fp4!r}.{did_you_mean(str(fp4), FP4)}"
    )


def _dims_fault(dims: Any) -> str | None:
    # A ListConfig of Hydra is a sequence as well.
    listed = isinstance(dims, Sequence) and not isinstance(dims, str)
    if listed and all(isinstance(dim, int) and not isinstance(dim, bool) and dim > 0 for dim in dims):
        return None
    return f"dynamic_dims are dims of the inputs after the batch, 1 or more, as [1] for tokens [N, L]; got {dims!r}"


OPTIONS: tuple[Option, ...] = (
    Option("smallest", 2, _smallest_fault),
    Option("dynamic_dims", (), _dims_fault),
    Option("round_sums", False, flag_fault("round_sums")),
    Option("fp4", FP4[0], _fp4_fault),
    Option("signed", False, flag_fault("signed")),
)
