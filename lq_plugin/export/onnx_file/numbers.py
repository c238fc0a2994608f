"""Types of numbers in ONNX, and constants of them: several elements are in a byte where a type has less than 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

#: Types of integers, by bits and sign.
TYPES = {
    (2, True): getattr(TensorProto, "INT2", None),
    (2, False): getattr(TensorProto, "UINT2", None),
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}
#: First opset and first format version with a type.
NEWER = {
    **dict.fromkeys((TYPES[2, True], TYPES[2, False]), (25, 13)),
    TensorProto.FLOAT4E2M1: (23, 11),
    TensorProto.FLOAT8E8M0: (24, 12),
}
#: Bits of the types of which several are in a byte.
_BITS = {kind: bits for (bits, _), kind in TYPES.items() if bits < 8} | {TensorProto.FLOAT4E2M1: 4}


def constant(name: str, values: NDArray[Any], kind: int) -> TensorProto:
    """Returns a constant of a type of ONNX; the elements of small types come as their bits.

    Args:
        name: its name in the graph.
        values: the elements.
        kind: their type, of `onnx.TensorProto`.
    """
    small = _BITS.get(kind)
    if small is None:
        return numpy_helper.from_array(
            np.asarray(values.astype(helper.tensor_dtype_to_np_dtype(kind)), order="C"), name
        )
    # The first element in the lowest bits.
    flat = values.astype(np.uint8).reshape(-1) & (2**small - 1)
    each = 8 // small
    flat = np.append(flat, np.zeros(-flat.size % each, np.uint8)).reshape(-1, each)
    packed = np.bitwise_or.reduce(flat << np.arange(0, 8, small, dtype=np.uint8), axis=1)
    return TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=packed.tobytes())
