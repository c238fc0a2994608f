"""Changes to an ONNX graph: weights as whole numbers, activations through QuantizeLinear and back."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.export.containers import Container
from lq_plugin.export.readers import CONV, MATRIX, calls, names_read
from lq_plugin.spec import IntegerGrid

_TYPES = {
    (2, True): getattr(TensorProto, "INT2", None),
    (2, False): getattr(TensorProto, "UINT2", None),
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}
#: Where the opset that a graph was exported in lacks a type: the first opset, and the first format version, that have it.
_NEWER = {2: (25, 13)}


class Graph:
    """An exported model whose initializers have the names of the parameters.

    Args:
        model: changed in place.
        smallest: bits of the smallest integer type that weights may have, 2, 4 or 8.
    """

    def __init__(self, model: onnx.ModelProto, smallest: int = 2) -> None:
        self.model = model
        self.smallest = smallest
        self.graph = model.graph
        self.known = {tensor.name: tensor for tensor in self.graph.initializer}
        #: New nodes by the name of the node that they stand before, and by the value that they stand behind.
        self.before: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.behind: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.shared: dict[tuple[Any, ...], str] = {}
        self.codes: dict[tuple[Any, ...], str] = {}
        self.made: set[str] = set()

    def put_weight(
        self, name: str, source: str, nodes: list[onnx.NodeProto], content: tuple[Container, bool], through_transpose: bool
    ) -> None:
        """Let `nodes`, calls of one layer, read the weight from whole numbers."""
        weight, exchanged = content
        transposed = {through_transpose or self._reads_transposed(node) for node in nodes}
        if len(transposed) != 1:
            raise ExportError(f"{source} is read in two orders by the exported graph")
        first, alone = nodes[0], len(nodes) == 1
        factor = None
        if weight.table is None and alone:
            factor = self._absorb_batch_norm(name, first, weight.zero_point is not None)
        value = self._dequantized(name, first, weight, exchanged != transposed.pop(), factor)
        for node in nodes:
            node.input[:] = [value if read == source or self._made_of(read, source) else read for read in node.input]

    def put_parameter(self, name: str, source: str, users: Sequence[onnx.NodeProto], content: tuple[Container, bool]) -> None:
        """Let nodes that do anything with a parameter read it from whole numbers."""
        nodes, through_transpose = calls(self.graph, users)
        if len(nodes) == 1 and nodes[0].op_type in MATRIX:
            self.put_weight(name, source, nodes, content, through_transpose)
            return
        value = self._dequantized(name, users[0], *content)
        for node in users:
            node.input[:] = [value if read == source else read for read in node.input]

    def _dequantized(
        self, name: str, before: onnx.NodeProto, weight: Container, flipped: bool = False, factor: Tensor | None = None
    ) -> str:
        """The real weight, made before a node: `[C_in, C_out]` if flipped, with its channels multiplied by factors."""
        source = f"{name}.weight"
        q = weight.q.transpose(0, 1) if flipped else weight.q
        if weight.table is not None:
            indices = self._initializer(f"{name}.weight_codes", q.numpy().astype(np.uint8), TensorProto.UINT8)
            table = self._initializer(f"{name}.weight_table", weight.table.numpy(), TensorProto.FLOAT)
            wide = self._node(before, "Cast", [indices], f"{name}.weight_index", to=TensorProto.INT32)
            return self._node(before, "Gather", [table, wide], f"{name}.weight_dequantized")
        bits = max(weight.bits, self.smallest)
        if bits == 2 and before.op_type in MATRIX and q.shape[-1] % 4:
            # ONNX Runtime 1.32 computes nonsense there: its fusion to MatMulNBits mixes up the columns.
            bits = 4
        if bits == 4 and before.op_type in MATRIX and q.shape[0 if flipped else 1] % 2:
            # OpenVINO 2026.4 computes nonsense there: it reads rows of 4-bit numbers as if they ended on whole bytes.
            bits = 8
        kind = self._type(bits, weight.signed, source)
        scale, zero_point = weight.scale, weight.zero_point
        assert scale is not None
        if factor is not None:
            scale = scale.expand(len(factor)) if scale.ndim == 0 else scale
            q, scale = _times(q, scale, factor, -(1 << (bits - 1)) if weight.signed and zero_point is None else 0)
            zero_point = zero_point.expand(len(factor)) if zero_point is not None and zero_point.ndim == 0 else zero_point
        if weight.block and flipped:
            scale = scale.transpose(0, 1)
            zero_point = None if zero_point is None else zero_point.transpose(0, 1)
        codes = self._weight_codes(f"{name}.weight_codes", q.contiguous().numpy(), kind)
        if before.op_type in CONV and bits < 8:
            # Runtimes have integer kernels of convolutions for 8 bits: a cast on loading, the file stays small.
            kind = TensorProto.INT8 if weight.signed else TensorProto.UINT8
            codes = self._node(before, "Cast", [codes], f"{name}.weight_int8", to=kind)
        inputs = [codes, self._initializer(f"{name}.weight_scale", scale.contiguous().numpy(), TensorProto.FLOAT)]
        if zero_point is not None:
            inputs.append(self._initializer(f"{name}.weight_zero_point", zero_point.contiguous().numpy(), kind))
        place = {"axis": (0 if flipped else 1) if weight.block else (1 if flipped else 0)} if scale.ndim else {}
        if weight.block:
            place["block_size"] = weight.block
        return self._node(before, "DequantizeLinear", inputs, f"{name}.weight_dequantized", **place)

    def _weight_codes(self, name: str, values: NDArray[Any], kind: int) -> str:
        """The whole numbers of a weight, once for tied layers that have the same ones."""
        content = (kind, values.shape, hashlib.blake2b(values.tobytes()).digest())
        if content not in self.codes:
            self.codes[content] = self._initializer(name, values, kind)
        self.known[name] = self.known[self.codes[content]]
        return self.codes[content]

    @staticmethod
    def _reads_transposed(node: onnx.NodeProto) -> bool:
        """Whether a Gemm had its weight as `[C_out, C_in]`; from now on it is `[C_in, C_out]`, which runtimes have kernels for."""
        flags = [a for a in node.attribute if a.name == "transB" and a.i] if node.op_type == "Gemm" else []
        for flag in flags:
            flag.i = 0
        return bool(flags)

    def put_bias(self, name: str, node: onnx.NodeProto, input_scale: Tensor) -> None:
        """Let a Gemm of whole numbers read its bias as int32 in steps of what it adds up, as ONNX Runtime's kernel has it.

        The rounding is half a step of the products: a thousandth of the activations' own or less.
        """
        scale = self.known.get(f"{name}.weight_scale")
        codes = self.known.get(f"{name}.weight_codes")
        if node.op_type != "Gemm" or len(node.input) != 3 or scale is None or codes is None or input_scale.ndim:
            return
        if f"{name}.bias_dequantized" in self.made:  # for another call of the layer
            node.input[2] = f"{name}.bias_dequantized"
            return
        if codes.data_type not in (TensorProto.INT8, TensorProto.UINT8) or len(scale.dims) > 1 or node.input[2] not in self.known:
            return
        bias = numpy_helper.to_array(self.known[node.input[2]]).astype(np.float64)
        step = (numpy_helper.to_array(scale) * np.float32(input_scale)).astype(np.float32)
        whole = np.rint(bias / step)
        if bias.shape != np.broadcast_shapes(bias.shape, step.shape) or not (np.abs(whole) < 2**31).all():
            return
        inputs = [
            self._initializer(f"{name}.bias_codes", whole, TensorProto.INT32),
            self._initializer(f"{name}.bias_scale", step, TensorProto.FLOAT),
        ]
        weight = next(new for new in self.before[node.name] if new.output[0] == node.input[1])
        if len(weight.input) == 2:
            # Its kernel wants a zero point to be there, though it is 0.
            weight.input.append(self._initializer(f"{name}.weight_zero_point", np.zeros_like(step), codes.data_type))
        node.input[2] = self._node(node, "DequantizeLinear", inputs, f"{name}.bias_dequantized", **({"axis": 0} if step.ndim else {}))
        self.made.add(node.input[2])

    def _type(self, bits: int, signed: bool, name: str) -> int:
        kind = _TYPES[bits, signed]
        if kind is None:
            raise ExportError(f"{name}: the installed onnx {onnx.__version__} has no INT{bits}; update it, or say smallest=4")
        if bits in _NEWER:
            opset, version = _NEWER[bits]
            entry = next(entry for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
            entry.version = max(entry.version, opset)
            self.model.ir_version = max(self.model.ir_version, version)
        return kind

    def put_activation(
        self, node: onnx.NodeProto, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, axis: int | None, operand: int = 0
    ) -> None:
        """Quantize what `node` reads as its input `operand`; readers of one tensor with the same qparams share the nodes."""
        source = node.input[operand]
        key = (source, scale.numpy().tobytes(), zero_point.numpy().tobytes(), grid, axis)
        if key not in self.shared:
            self.shared[key] = self._quantize(source, scale.numpy(), zero_point.numpy(), grid, axis)
        node.input[operand] = self.shared[key]

    def _quantize(self, source: str, scale: NDArray[Any], zero_point: NDArray[Any], grid: IntegerGrid, axis: int | None) -> str:
        # Next to where it is made: those who read it may stand in any order.
        added = self.behind[source]
        bits = 8 if grid.levels <= 256 else 16
        stem = f"{source}.quantized_{len(self.shared)}"
        whole = grid.levels in (256, 65536)
        if not whole:
            # Fewer levels than the type has: clipped to the outermost ones first.
            if axis is not None:
                raise ExportError(f"{source}: per-channel activations of {grid.levels} levels have no exact form in ONNX")
            outermost = {"low": grid.quant_min, "high": grid.quant_max}
            ends = [
                self._initializer(f"{stem}_{key}", np.asarray((end - zero_point) * scale, np.float32), TensorProto.FLOAT)
                for key, end in outermost.items()
            ]
            source = _make(added, "Clip", [source, *ends], f"{stem}_clipped")
        # Signed levels moved up to unsigned ones: the same numbers, which runtimes have the faster kernels for.
        kind = self._type(bits, False, source)
        zero_point = zero_point.astype(np.int64) + (2 ** (bits - 1) if grid.signed else 0)
        parameters = [
            self._initializer(f"{stem}_scale", scale, TensorProto.FLOAT),
            self._initializer(f"{stem}_zero_point", zero_point, kind),
        ]
        place = {} if axis is None else {"axis": axis}
        codes = _make(added, "QuantizeLinear", [source, *parameters], stem, **place)
        return _make(added, "DequantizeLinear", [codes, *parameters], f"{stem}_real", **place)

    def _absorb_batch_norm(self, name: str, node: onnx.NodeProto, affine: bool) -> Any:
        """Factors that a following batch norm brings to the output channels; its shift goes to the bias. None: there is none."""
        if node.op_type != "Conv":
            return None
        followers = [other for other in self.graph.node if node.output[0] in names_read(other)]
        given_out = any(value.name == node.output[0] for value in self.graph.output)
        if len(followers) != 1 or followers[0].op_type != "BatchNormalization" or given_out:
            return None
        norm = followers[0]
        if any(value not in self.known for value in norm.input[1:5]):
            return None
        weight, shift, mean, variance = (numpy_helper.to_array(self.known[value]).astype(np.float64) for value in norm.input[1:5])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = weight / np.sqrt(variance + epsilon)
        if affine and not factor.all():
            return None
        bias = numpy_helper.to_array(self.known[node.input[2]]).astype(np.float64) if len(node.input) == 3 else 0.0
        moved = self._initializer(f"{name}.bias_folded", ((bias - mean) * factor + shift).astype(np.float32), TensorProto.FLOAT)
        del node.input[2:]
        node.input.append(moved)
        # Under the norm's name, which other nodes read, and which may be an output of the graph, too.
        node.output[0] = norm.output[0]
        self.graph.node.remove(norm)
        return torch.from_numpy(factor.astype(np.float32))

    def _made_of(self, value: str, weight: str) -> bool:
        return any(node.op_type == "Transpose" and node.output[0] == value and node.input[0] == weight for node in self.graph.node)

    def _initializer(self, name: str, values: NDArray[Any], kind: int) -> str:
        small = next((bits for bits in (2, 4) if kind in (_TYPES[bits, True], _TYPES[bits, False])), None)
        if small is not None:
            # The first element in the lowest bits.
            flat = values.astype(np.uint8).reshape(-1) & (2**small - 1)
            each = 8 // small
            flat = np.append(flat, np.zeros(-flat.size % each, np.uint8)).reshape(-1, each)
            packed = np.bitwise_or.reduce(flat << np.arange(0, 8, small, dtype=np.uint8), axis=1)
            tensor = TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=packed.tobytes())
        else:
            tensor = numpy_helper.from_array(np.asarray(values.astype(helper.tensor_dtype_to_np_dtype(kind)), order="C"), name)
        self.graph.initializer.append(tensor)
        self.known[name] = self.graph.initializer[-1]
        return name

    def _node(self, before: onnx.NodeProto, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        return _make(self.before[before.name], op_type, inputs, output, **attributes)

    def finish(self) -> onnx.ModelProto:
        """Put the new nodes where they belong, drop what nothing reads."""
        nodes = [new for value in self.graph.input for new in self.behind[value.name]]
        for node in self.graph.node:
            nodes += [*self.before[node.name], node, *(new for value in node.output for new in self.behind[value])]
        used = {value.name for value in self.graph.output}
        alive: list[onnx.NodeProto] = []
        for node in reversed(nodes):
            if used.intersection(node.output):
                alive.append(node)
                used.update(names_read(node))
        del self.graph.node[:]
        self.graph.node.extend(reversed(alive))
        for node in self.graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        del self.graph.value_info[:]
        del self.graph.metadata_props[:]
        return self.model


def _make(nodes: list[onnx.NodeProto], op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
    """Append a node; its output's name."""
    nodes.append(helper.make_node(op_type, inputs, [output], f"node_{output}", **attributes))
    return output


def _times(q: Tensor, scale: Tensor, factor: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of weights whose channels are multiplied with a factor each.

    A negative factor changes the sign of the whole numbers where their type has all the negatives, else that of the scale.
    A factor of 0 leaves no weight. All of it is exact.

    Args:
        q: `[C_out, ...]`, no smaller than the type's `lowest`; 0: of a type without negatives.
        scale: `[C_out, ...]`.
        factor: `[C_out]`.
    """
    gone = factor == 0
    opposite = (factor < 0) & (q.flatten(1).amin(1) > lowest) & (lowest < 0)
    factor = torch.where(opposite, -factor, factor)
    over_q, over_scale = (-1, *[1] * (q.ndim - 1)), (-1, *[1] * (scale.ndim - 1))
    q = torch.where(opposite.view(over_q), -q, q).masked_fill(gone.view(over_q), 0)
    return q, (scale * factor.view(over_scale)).masked_fill(gone.view(over_scale), 1.0)
