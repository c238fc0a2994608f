"""Weights in small floating point numbers, FP8 and FP4, with their scales as small as the format has them.

    FLOAT8E4M3FN, FLOAT8E5M2    w = Cast(q) · scale
    UINT4                       w = Gather(the 16 values of E2M1, q) · scale
    FLOAT4E2M1                  w = DequantizeLinear(q, scale)

    scale = Cast(FLOAT8E8M0)    or Cast(FLOAT8E4M3FN) · tensor_scale, or float32; repeated for the elements of a block

All nodes read constants. ONNX Runtime (1.32) computes a Cast and its followers once, when it loads the file, but every
DequantizeLinear at each run, which with FP8 and one row takes longer than the product. It has no kernel for
FLOAT4E2M1; OpenVINO (2026.4) multiplies with it as it stands, where blocks are whole.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from lq_plugin.functional.minifloat import E2M1, E4M3, E5M2, minifloat_codes, minifloat_values
from lq_plugin.quantizers.registry import FloatContainer

#: Elements that ONNX has types for.
FLOATS = {E2M1: TensorProto.FLOAT4E2M1, E4M3: TensorProto.FLOAT8E4M3FN, E5M2: TensorProto.FLOAT8E5M2}


class Additions(Protocol):
    """Graph that takes constants, and nodes before a node; see `lq_plugin.export.onnx_file.graph.Graph`."""

    def initializer(self, name: str, values: NDArray[Any], kind: int) -> str: ...

    def weight_codes(self, name: str, values: NDArray[Any], kind: int) -> str: ...

    def node(self, before: onnx.NodeProto, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str: ...


def put_floats(
    graph: Additions, name: str, before: onnx.NodeProto, weight: FloatContainer, flipped: bool, fp4: str
) -> str:
    """Returns the name of the real weight.

    Args:
        graph: gets its constants and nodes.
        name: of the layer.
        before: node that reads the weight.
        weight: small floating point numbers.
        flipped: the node reads `[C_in, C_out]`.
        fp4: "uint4" or "float4", see `Form`.
    """
    q = weight.q.transpose(0, 1) if flipped else weight.q
    axis = int(bool(weight.block) != flipped)  # along which the scales differ
    scale = _scale(graph, name, before, weight, flipped)
    # OpenVINO 2026.4 reads no blocks that do not divide their axis, and computes nonsense with FLOAT4E2M1 that is
    # multiplied with a scale for each element.
    whole = not weight.block or q.shape[axis] % weight.block == 0
    kind = FLOATS[weight.element] if weight.element != E2M1 or (fp4 == "float4" and whole) else TensorProto.UINT4
    codes = graph.weight_codes(f"{name}.weight_codes", _of_type(q, kind), kind)
    if kind == TensorProto.FLOAT4E2M1:
        place = {"axis": axis} | ({"block_size": weight.block} if weight.block else {})
        return graph.node(before, "DequantizeLinear", [codes, scale], f"{name}.weight_dequantized", **place)
    if kind == TensorProto.UINT4:
        values = minifloat_values(torch.arange(16), E2M1).numpy()
        table = graph.initializer(f"{name}.weight_table", values, TensorProto.FLOAT)
        wide = graph.node(before, "Cast", [codes], f"{name}.weight_index", to=TensorProto.INT32)
        real = graph.node(before, "Gather", [table, wide], f"{name}.weight_numbers")
    else:
        real = graph.node(before, "Cast", [codes], f"{name}.weight_numbers", to=TensorProto.FLOAT)
    each = _for_each_element(graph, name, before, scale, axis, tuple(q.shape), weight)
    return graph.node(before, "Mul", [real, each], f"{name}.weight_dequantized")


def _scale(graph: Additions, name: str, before: onnx.NodeProto, weight: FloatContainer, flipped: bool) -> str:
    """Returns the name of the float32 scales, `[]`, `[C_out]` or one for each block."""
    scale = weight.scale.transpose(0, 1) if flipped and weight.block else weight.scale
    stem = f"{name}.weight_scale"
    if weight.scale_type == "float32":
        made = graph.initializer(stem, scale.contiguous().numpy(), TensorProto.FLOAT)
    else:
        # Powers of two as their exponent plus 127.
        bits = torch.frexp(scale).exponent + 126 if weight.scale_type == "E8M0" else minifloat_codes(scale, E4M3)
        kind = TensorProto.FLOAT8E8M0 if weight.scale_type == "E8M0" else TensorProto.FLOAT8E4M3FN
        codes = graph.initializer(f"{stem}_codes", _of_type(bits, kind), kind)
        made = graph.node(before, "Cast", [codes], stem, to=TensorProto.FLOAT)
    if weight.tensor_scale is None:
        return made
    whole = graph.initializer(f"{stem}_of_all", weight.tensor_scale.numpy(), TensorProto.FLOAT)
    return graph.node(before, "Mul", [made, whole], f"{stem}_product")


def _for_each_element(
    graph: Additions,
    name: str,
    before: onnx.NodeProto,
    scale: str,
    axis: int,
    shape: tuple[int, ...],
    weight: FloatContainer,
) -> str:
    """Returns the name of scales that broadcast to a weight of that shape."""
    stem = f"{name}.weight_scale"

    def shaped(value: str, op_type: str, sizes: list[int], what: str) -> str:
        wanted = graph.initializer(f"{stem}_{what}_shape", np.array(sizes), TensorProto.INT64)
        return graph.node(before, op_type, [value, wanted], f"{stem}_{what}")

    if not weight.block:
        ones = [-1 if dim == axis else 1 for dim in range(len(shape))]
        return shaped(scale, "Reshape", ones, "broadcast") if weight.scale.ndim else scale
    count = -(-shape[axis] // weight.block)
    after = list(shape[axis + 1 :])
    value = shaped(scale, "Reshape", [*shape[:axis], count, 1, *after], "blocks")
    value = shaped(value, "Expand", [*shape[:axis], count, weight.block, *after], "repeated")
    value = shaped(value, "Reshape", [*shape[:axis], count * weight.block, *after], "elements")
    if shape[axis] % weight.block == 0:
        return value
    ends = {"start": 0, "end": shape[axis], "axis": axis}
    limits = [graph.initializer(f"{stem}_{key}", np.array([end]), TensorProto.INT64) for key, end in ends.items()]
    return graph.node(before, "Slice", [value, *limits], f"{stem}_cut")


def _of_type(bits: Tensor, kind: int) -> NDArray[Any]:
    """Returns bits as numbers of an 8-bit type; as they are for those of 4 bits."""
    values: NDArray[Any] = np.ascontiguousarray(bits.numpy().astype(np.uint8))
    small = kind in (TensorProto.UINT4, TensorProto.FLOAT4E2M1)
    return values if small else values.view(helper.tensor_dtype_to_np_dtype(kind))
