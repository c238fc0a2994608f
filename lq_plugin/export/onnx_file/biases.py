"""Biases next to quantized inputs, in a form that ONNX Runtime computes as it stands.

ONNX Runtime (1.32, `WeightBiasQuantization`) converts the float bias of a Conv, ConvTranspose or Gemm whose input is
dequantized and whose result is quantized to int32, in steps of input scale times weight scale. It does not check that
the bias fits: where a channel's weights are tiny, the integers wrap around. It also converts float weights to int8
there. So the file leaves nothing to be done:

    the bias fits       DequantizeLinear(int32) with that step; its rounding error is at most half a step
    it does not fit     it is added afterwards, in float
    float weights       also added afterwards; without a bias the result passes a Sum of one operand
    small weights       a Gemm's, too, where its result stays float: in steps of so few levels rounding would cost more

A Gemm is computed with integers only where the zero point of its weight is written, though it is 0, and its bias is
int32 or none.

The bias is added by a node that no other pass of ONNX Runtime fuses back: Sum after Conv, ConvTranspose and MatMul
(Conv and Add are fused to Conv, MatMul and Add to Gemm), Add after Gemm (Gemm and Sum are fused to Gemm).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lq_plugin.export.onnx_file.queries import CONV, names_read, readers_by_name

#: Operations allowed between a product and the QuantizeLinear that reads it; the runtime moves it through most of them.
_BETWEEN = (
    "Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice", "Pad", "Identity",
)  # fmt: skip
#: Kernels sum products in int32.
_LIMIT = 2**31 - 1
_BYTES = (TensorProto.INT8, TensorProto.UINT8)
_FLOATS = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)


def settle_biases(model: onnx.ModelProto) -> list[str]:
    """Rewrites, in place, what ONNX Runtime would quantize on its own.

    Args:
        model: quantized by `export_onnx`.

    Returns:
        Names of biases next to integer weights that do not fit: the runtime computes such layers in float.
    """
    return _Biases(model).settle()


class _Biases:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producer = {name: node for node in self.graph.node for name in node.output}
        self.readers = readers_by_name(self.graph)
        self.before: dict[str, list[onnx.NodeProto]] = {}
        self.after: dict[str, onnx.NodeProto] = {}
        #: Dequantized biases by name and the bytes of the step.
        self.made: dict[tuple[str, bytes], str] = {}

    def settle(self) -> list[str]:
        moved = []
        for node in self.graph.node:
            if (
                node.op_type not in (*CONV, "Gemm", "MatMul")
                or (input_scale := self._input_scale(node.input[0])) is None
            ):
                continue
            bias, weight, quantized = (
                self._bias(node),
                self._dequantizer(node.input[1]),
                self._is_quantized_later(node.output[0]),
            )
            if weight is None:
                if quantized and self._is_constant(node.input[1]):
                    self._add_afterwards(node, bias)
            elif (
                bias is not None
                and self._value(weight.input[1]).ndim < 2
                and (quantized or (node.op_type == "Gemm" and self._has_whole_bytes(weight)))
            ):
                if (fitting := self._in_steps(bias, weight, input_scale)) is not None:
                    self._read_integers(node, bias, *fitting)
                elif quantized:
                    moved.append(bias)
                    self._add_afterwards(node, bias)
        for node in self.graph.node:
            self._settle_gemm(node)
        self._rebuild()
        return moved

    def _input_scale(self, name: str) -> NDArray[Any] | None:
        """Returns the scale of a dequantized activation where it is a single one, else None."""
        node = self.producer.get(name)
        while node is not None and node.op_type in _BETWEEN:
            node = self.producer.get(node.input[0])
        read = None if node is None else self._dequantizer(node.output[0])
        if read is None or self._is_constant(read.input[0]):
            return None
        if len(read.input) > 2 and self.constants[read.input[2]].data_type in _FLOATS:
            return None  # a product of floats, whose bias stays one
        scale = self._value(read.input[1])
        return scale if scale.size == 1 else None

    def _dequantizer(self, name: str) -> onnx.NodeProto | None:
        node = self.producer.get(name)
        return (
            node
            if node is not None and node.op_type == "DequantizeLinear" and node.input[1] in self.constants
            else None
        )

    def _bias(self, node: onnx.NodeProto) -> str | None:
        """Returns the constant that is added to a product, or None."""
        if node.op_type != "MatMul":
            return node.input[2] if len(node.input) == 3 and node.input[2] in self.constants else None
        added = self._sum_of(node)
        return None if added is None else next(name for name in added.input if name != node.output[0])

    def _sum_of(self, matmul: onnx.NodeProto) -> onnx.NodeProto | None:
        """Returns the Add that alone reads a MatMul and adds a constant vector, or None."""
        readers = self.readers.get(matmul.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add":
            return None
        vectors = [name for name in readers[0].input if name in self.constants and len(self.constants[name].dims) == 1]
        return readers[0] if vectors else None

    def _is_constant(self, name: str) -> bool:
        """Returns True where only constants go into a value."""
        node = self.producer.get(name)
        return name in self.constants if node is None else all(self._is_constant(read) for read in node.input if read)

    def _is_quantized_later(self, name: str) -> bool:
        """Returns True where a QuantizeLinear reads a value, directly or after operations that only move or clip it."""
        for node in self.readers.get(name, []):
            if node.op_type == "QuantizeLinear" or (
                node.op_type in _BETWEEN and self._is_quantized_later(node.output[0])
            ):
                return True
            # MatMul and its bias are one Gemm to the runtime.
            if (
                node.op_type == "Add"
                and any(other in self.constants for other in node.input)
                and self._is_quantized_later(node.output[0])
            ):
                return True
        return False

    def _has_whole_bytes(self, weight: onnx.NodeProto) -> bool:
        """Returns True for integers that the file holds as bytes, of which a bias has fine steps."""
        codes = self.constants.get(weight.input[0])
        return codes is not None and codes.data_type in _BYTES

    def _settle_gemm(self, node: onnx.NodeProto) -> None:
        """Gives a Gemm between bytes what its integer kernel wants: a zero point, though it is 0, and no float bias."""
        weight = self._dequantizer(node.input[1]) if node.op_type == "Gemm" else None
        if weight is None or self._type(weight.input[0]) not in _BYTES or not self._is_bytes(node.input[0]):
            return
        if self._value(weight.input[1]).ndim > 1:
            return  # of blocks, for which there is no integer kernel
        if len(weight.input) == 2:
            kind = helper.tensor_dtype_to_np_dtype(self._type(weight.input[0]))
            weight.input.append(f"{weight.output[0]}_zero_point")
            self._constant(weight.input[2], np.zeros(self._value(weight.input[1]).shape, kind))
        if len(node.input) == 3 and node.input[2] in self.constants:
            self._add_afterwards(node, node.input[2])

    def _is_bytes(self, name: str) -> bool:
        """Returns True for a tensor that was just made of bytes, also of a range found at run time."""
        read = self.producer.get(name)
        if read is None or read.op_type != "DequantizeLinear" or self._is_constant(read.input[0]):
            return False
        zero_point = self.constants.get(read.input[2])
        return zero_point is None or zero_point.data_type in _BYTES

    def _type(self, name: str) -> int:
        """Returns the type of a weight's integers, which a Cast may have made of a smaller one."""
        node = self.producer.get(name)
        if node is None:
            return int(self.constants[name].data_type)
        return next((a.i for a in node.attribute if a.name == "to"), TensorProto.UNDEFINED)

    def _in_steps(
        self, bias: str, weight: onnx.NodeProto, input_scale: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Returns the bias as int32 and its step, or None where a sum of products with it might leave int32."""
        values = self._value(bias).astype(np.float64)
        step = (self._value(weight.input[1]) * np.float32(input_scale.reshape(()))).astype(np.float32)
        if np.broadcast_shapes(values.shape, step.shape) != values.shape or not step.all():
            return None
        integers = np.rint(values / step)
        return (integers, step) if (np.abs(integers) + self._largest_sum(weight) <= _LIMIT).all() else None

    def _largest_sum(self, weight: onnx.NodeProto) -> NDArray[Any]:
        """Returns the largest sum of products of bytes with the integers of each output channel."""
        codes = self._codes(weight.input[0]).astype(np.int64)
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        if len(weight.input) == 3:
            zero_point = self._value(weight.input[2]).astype(np.int64)
            codes = codes - (
                zero_point.reshape([-1 if dim == axis else 1 for dim in range(codes.ndim)])
                if zero_point.ndim
                else zero_point
            )
        kept = (axis,) if self._value(weight.input[1]).ndim else ()
        sums: NDArray[Any] = np.abs(codes).sum(tuple(dim for dim in range(codes.ndim) if dim not in kept))
        return 255 * sums

    def _codes(self, name: str) -> NDArray[Any]:
        node = self.producer.get(name)
        return self._value(name if node is None else node.input[0])

    def _value(self, name: str) -> NDArray[Any]:
        value: NDArray[Any] = numpy_helper.to_array(self.constants[name])
        return value

    def _read_integers(self, node: onnx.NodeProto, bias: str, integers: NDArray[Any], step: NDArray[Any]) -> None:
        if node.op_type == "MatMul":
            return  # an Add, which the runtime itself puts into integers
        key = bias, step.tobytes()
        if key not in self.made:
            stem = bias if not any(name == bias for name, _ in self.made) else f"{bias}_{len(self.made)}"
            self._constant(f"{stem}_codes", integers.astype(np.int32))
            self._constant(f"{stem}_scale", step)
            inputs, self.made[key] = [f"{stem}_codes", f"{stem}_scale"], f"{stem}_dequantized"
            place: dict[str, Any] = {"axis": 0} if step.ndim else {}
            made = helper.make_node("DequantizeLinear", inputs, [self.made[key]], f"node_{self.made[key]}", **place)
            self.before.setdefault(node.name, []).append(made)
        node.input[2] = self.made[key]

    def _add_afterwards(self, node: onnx.NodeProto, bias: str | None) -> None:
        if node.op_type == "MatMul":
            if (added := self._sum_of(node)) is not None:
                added.op_type = "Sum"
            return
        if bias is None and len(node.input) == 3:
            return  # computed, which the runtime leaves alone
        result = node.output[0]
        node.output[0] = f"{result}_without_bias"
        operands = [node.output[0]]
        if bias is not None:
            del node.input[2:]
            operands.append(self._spread(bias, _spatial_dims(node)) if node.op_type in CONV else bias)
        kind = "Add" if node.op_type == "Gemm" and bias is not None else "Sum"
        self.after[node.output[0]] = helper.make_node(kind, operands, [result], f"node_{result}_with_bias")

    def _spread(self, bias: str, dims: int) -> str:
        """Returns the bias of a convolution as `[C, 1, ...]`."""
        name = f"{bias}_spread"
        if name not in self.constants:
            self._constant(name, self._value(bias).reshape(-1, *[1] * dims))
        return name

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.constants[name] = self.graph.initializer[-1]

    def _rebuild(self) -> None:
        """Puts the new nodes in their places, and drops constants that nothing reads any more."""
        nodes = []
        for node in self.graph.node:
            nodes += [
                *self.before.get(node.name, []),
                node,
                *(self.after[name] for name in node.output if name in self.after),
            ]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        read = {name for node in copies for name in names_read(node)} | {value.name for value in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def _spatial_dims(conv: onnx.NodeProto) -> int:
    return next(len(a.ints) for a in conv.attribute if a.name in ("strides", "dilations", "kernel_shape"))
