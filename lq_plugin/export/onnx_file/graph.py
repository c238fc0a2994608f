"""Changes to an ONNX graph: weights as integers, activations through QuantizeLinear and back."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.export.onnx_file.batch_norms import absorb_batch_norm
from lq_plugin.export.onnx_file.containers import Container, FloatContainer, for_float_kernels
from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.onnx_file.minifloats import FLOATS, put_floats
from lq_plugin.export.onnx_file.numbers import NEWER, TYPES, constant
from lq_plugin.export.onnx_file.queries import CONV, MATRIX, calls, names_read, tensor_type
from lq_plugin.export.onnx_file.scales import ordinary, times
from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.minifloat import Minifloat
from lq_plugin.intent.spec import IntegerGrid

#: Scale of an activation that is 0 everywhere, where any scale would do.
_SCALE_OF_ZEROS = 2.0**-10


class Graph:
    """Exported model whose initializers have the names of the parameters.

    Args:
        model: changed in place.
        form: choices made for a runtime.
        byte_inputs: names of the layers that read bytes with one scale.
    """

    def __init__(self, model: onnx.ModelProto, form: Form, byte_inputs: Collection[str] = ()) -> None:
        self.model = model
        self.form = form
        self.byte_inputs = byte_inputs
        self.graph = model.graph
        self.known = {tensor.name: tensor for tensor in self.graph.initializer}
        #: Type of the float model, float32 or float16. What is quantized is float32 between two Casts.
        half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in self.graph.initializer)
        self.float = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        #: New nodes by the name of the node that follows them, and by the value that they read.
        self.before: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.after: dict[str, list[onnx.NodeProto]] = defaultdict(
            list
        )  # next to where it is made: in front of all readers
        self.shared: dict[tuple[Any, ...], str] = {}
        self.codes: dict[tuple[Any, ...], str] = {}
        #: Layers without a kernel in ONNX Runtime, with the reason.
        self.slow: dict[str, str] = {}

    def put_weight(
        self,
        name: str,
        source: str,
        nodes: list[onnx.NodeProto],
        content: tuple[Container | FloatContainer, bool],
        through_transpose: bool,
    ) -> None:
        """Lets `nodes`, calls of one layer, read the weight from integers.

        Args:
            name: of the layer.
            source: initializer of the float weight.
            nodes: convolutions, matrix products or Gathers.
            content: the container, and True where its dims 0 and 1 are exchanged in the layer.
            through_transpose: the nodes read the weight through a Transpose.
        """
        weight, exchanged = content
        transposed = {through_transpose or self._reads_transposed(node) for node in nodes}
        if len(transposed) != 1:
            raise ExportError(f"{source} is read in two orders by the exported graph")
        first, alone = nodes[0], len(nodes) == 1
        factor = None
        if isinstance(weight, Container) and weight.table is None and alone and self.float == TensorProto.FLOAT:
            factor = absorb_batch_norm(self, name, first, weight)
        value = self._real(name, first, weight, exchanged != transposed.pop(), factor)
        for node in nodes:
            node.input[:] = [value if read == source or self._made_of(read, source) else read for read in node.input]

    def put_parameter(
        self, name: str, source: str, users: Sequence[onnx.NodeProto], content: tuple[Container | FloatContainer, bool]
    ) -> None:
        """Lets nodes that do anything with a parameter read it from integers.

        Args:
            name: of the layer.
            source: initializer of the float parameter.
            users: the nodes.
            content: see `put_weight`.
        """
        nodes, through_transpose = calls(self.graph, users)
        if nodes and all(node.op_type in MATRIX for node in nodes):
            self.put_weight(name, source, nodes, content, through_transpose)
            return
        weight, exchanged = content
        turned = any(node.op_type == "Transpose" for node in users)
        if turned and isinstance(weight, Container) and weight.bits == 2 and weight.zero_point is not None:
            # ONNX Runtime 1.32 cannot load them from 128 bytes on: it transposes the zero points, and has no type for
            # the result.
            weight = replace(weight, bits=4)
        value = self._real(name, users[0], weight, exchanged)
        for node in users:
            node.input[:] = [value if read == source else read for read in node.input]

    def _real(
        self,
        name: str,
        before: onnx.NodeProto,
        weight: Container | FloatContainer,
        flipped: bool,
        factor: Tensor | None = None,
    ) -> str:
        """Returns the name of the real weight in the model's type; arguments as of `_dequantized`."""
        value = self._dequantized(name, before, weight, flipped, factor)
        if self.float == TensorProto.FLOAT:
            return value
        return self.node(before, "Cast", [value], f"{name}.weight_cast", to=self.float)

    def _dequantized(
        self,
        name: str,
        before: onnx.NodeProto,
        weight: Container | FloatContainer,
        flipped: bool = False,
        factor: Tensor | None = None,
    ) -> str:
        """Returns the name of the real weight, made before a node; flipped: `[C_in, C_out]`, channels times factors."""
        if isinstance(weight, FloatContainer):
            return put_floats(self, name, before, weight, flipped, self.form.fp4)
        source = f"{name}.weight"
        q = weight.q.transpose(0, 1) if flipped else weight.q
        if weight.table is not None:
            small = len(weight.table) <= 16 and self.form.smallest <= 4
            index = TensorProto.UINT4 if small else TensorProto.UINT8
            indices = self.weight_codes(f"{name}.weight_codes", q.numpy().astype(np.uint8), index)
            table = self.initializer(f"{name}.weight_table", weight.table.numpy(), TensorProto.FLOAT)
            wide = self.node(before, "Cast", [indices], f"{name}.weight_index", to=TensorProto.INT32)
            return self.node(before, "Gather", [table, wide], f"{name}.weight_dequantized")
        bits = max(weight.bits, self.form.smallest, 0 if weight.block else self.form.smallest_whole)
        # Runtimes have integer kernels for 8 bits alone: a cast on loading, the file stays small.
        between_bytes = name in self.byte_inputs and before.op_type in MATRIX and not weight.block
        widened = bits < 8 and (between_bytes or before.op_type in CONV)
        if before.op_type in MATRIX and not widened:
            weight, bits, missing = for_float_kernels(weight, bits, q.shape[0 if flipped else 1], q.shape[-1])
            if missing is not None:
                self.slow[name] = missing
        kind = self._type(bits, weight.signed, source)
        scale, zero_point = weight.scale, weight.zero_point
        assert scale is not None
        if factor is not None:
            scale = scale.expand(len(factor)) if scale.ndim == 0 else scale
            q, scale = times(q, scale, factor, -(1 << (bits - 1)) if weight.signed and zero_point is None else 0)
            zero_point = (
                zero_point.expand(len(factor)) if zero_point is not None and zero_point.ndim == 0 else zero_point
            )
        if not weight.block:
            scale = ordinary(scale, q.transpose(0, 1) if flipped else q, zero_point)
        if weight.block and flipped:
            scale = scale.transpose(0, 1)
            zero_point = None if zero_point is None else zero_point.transpose(0, 1)
        codes = self.weight_codes(f"{name}.weight_codes", q.contiguous().numpy(), kind)
        if widened:
            kind = TensorProto.INT8 if weight.signed else TensorProto.UINT8
            codes = self.node(before, "Cast", [codes], f"{name}.weight_int8", to=kind)
        inputs = [codes, self.initializer(f"{name}.weight_scale", scale.contiguous().numpy(), TensorProto.FLOAT)]
        if zero_point is not None:
            inputs.append(self.initializer(f"{name}.weight_zero_point", zero_point.contiguous().numpy(), kind))
        place = {"axis": (0 if flipped else 1) if weight.block else (1 if flipped else 0)} if scale.ndim else {}
        if weight.block:
            place["block_size"] = weight.block
        return self.node(before, "DequantizeLinear", inputs, f"{name}.weight_dequantized", **place)

    def weight_codes(self, name: str, values: NDArray[Any], kind: int) -> str:
        """Returns the name of a weight's integers, one for tied layers.

        Args:
            name: of the layer.
            values: the integers.
            kind: their type, of `onnx.TensorProto`.
        """
        content = (kind, values.shape, hashlib.blake2b(values.tobytes()).digest())
        if content not in self.codes:
            self.codes[content] = self.initializer(name, values, kind)
        self.known[name] = self.known[self.codes[content]]
        return self.codes[content]

    @staticmethod
    def _reads_transposed(node: onnx.NodeProto) -> bool:
        """Makes a Gemm read `[C_in, C_out]`, for which runtimes have kernels; True where it read the transpose."""
        flags = [a for a in node.attribute if a.name == "transB" and a.i] if node.op_type == "Gemm" else []
        for flag in flags:
            flag.i = 0
        return bool(flags)

    def _type(self, bits: int, signed: bool, name: str) -> int:
        kind = TYPES[bits, signed]
        if kind is None:
            raise ExportError(
                f"{name}: the installed onnx {onnx.__version__} has no INT{bits}; update it, or say smallest=4"
            )
        return int(kind)

    def need(self, opset: int, version: int = 0) -> None:
        """Raises the file's opset and format version to these, if they are lower."""
        entry = next(entry for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        entry.version = max(entry.version, opset)
        self.model.ir_version = max(self.model.ir_version, version)

    def put_activation(
        self,
        node: onnx.NodeProto,
        scale: Tensor,
        zero_point: Tensor,
        grid: IntegerGrid,
        axis: int | None,
        operand: int = 0,
    ) -> None:
        """Quantizes input `operand` of a node; readers of one tensor with the same qparams share the nodes.

        Args:
            node: that reads the activation.
            scale, zero_point: `[]`, or `[C]` with an axis.
            grid: integer levels.
            axis: of the channels; None: per tensor.
            operand: which of the node's inputs.
        """
        # Neither ONNX Runtime (1.32) nor OpenVINO (2026.4) runs a matrix product of integers that have a scale for each
        # channel.
        qparams = scale.numpy(), zero_point.numpy()
        by_operations = axis is not None and (node.op_type in MATRIX or grid.levels not in (256, 65536))
        source = node.input[operand]

        def rounded(added: list[onnx.NodeProto], stem: str, value: str) -> str:
            if axis is None or not by_operations:
                return self._quantize(added, stem, value, *qparams, grid, axis)
            dims_after = (-axis if axis < 0 else self._rank(source) - axis) - 1
            return self._round(added, stem, value, *qparams, grid, dims_after)

        self._put(node, operand, (*(value.tobytes() for value in qparams), grid, axis, by_operations), rounded)

    def put_dynamic(self, node: onnx.NodeProto, operand: int = 0) -> None:
        """Quantizes input `operand` of a node with the range that it has at run time.

        Args:
            node, operand: that reads the activation, and as which of its inputs.
        """

        def rounded(added: list[onnx.NodeProto], stem: str, value: str) -> str:
            made = [stem, f"{stem}_scale", f"{stem}_zero_point"]
            added.append(helper.make_node("DynamicQuantizeLinear", [value], made, f"node_{stem}"))
            return _make(added, "DequantizeLinear", made, f"{stem}_real")

        self._put(node, operand, ("dynamic",), rounded)

    def put_float(self, node: onnx.NodeProto, scale: Tensor, element: Minifloat, operand: int = 0) -> None:
        """Casts input `operand` of a node to small floating point numbers under a scale, saturating, and back.

        Args:
            node, operand: that reads the activation, and as which of its inputs.
            scale: `[]`.
            element: E4M3 or E5M2.
        """
        kind = FLOATS[element]
        # ONNX Runtime (1.32) leaves out a Relu in front of it, as if 0 were the lowest number, also with operations
        # between that only move elements. It moves nothing past a Max.
        lowest = np.asarray(-element.max_value * scale.item(), np.float32)

        def rounded(added: list[onnx.NodeProto], stem: str, value: str) -> str:
            low = self.initializer(f"{stem}_low", lowest, TensorProto.FLOAT)
            value = _make(added, "Max", [value, low], f"{stem}_from_low")
            parameters = [
                self.initializer(f"{stem}_scale", scale.numpy(), TensorProto.FLOAT),
                self.initializer(f"{stem}_zero_point", np.zeros((), helper.tensor_dtype_to_np_dtype(kind)), kind),
            ]
            codes = _make(added, "QuantizeLinear", [value, *parameters], stem)
            return _make(added, "DequantizeLinear", [codes, *parameters], f"{stem}_real")

        self._put(node, operand, (scale.item(), element), rounded)

    def _put(
        self,
        node: onnx.NodeProto,
        operand: int,
        qparams: tuple[Any, ...],
        rounded: Callable[[list[onnx.NodeProto], str, str], str],
    ) -> None:
        """Makes input `operand` of a node read a rounded tensor, the one that others read with the same qparams.

        Args:
            node, operand: that reads the activation, and as which of its inputs.
            qparams: what the rounded tensor depends on besides the activation.
            rounded: adds nodes that round a float32 tensor, named from a stem; returns the name of the result.
        """
        source = node.input[operand]
        if (key := (source, *qparams)) not in self.shared:
            added, stem = self.after[source], f"{source}.quantized_{len(self.shared)}"
            half = self._float_type(source) == TensorProto.FLOAT16
            value = _make(added, "Cast", [source], f"{stem}_float", to=TensorProto.FLOAT) if half else source
            value = rounded(added, stem, value)
            self.shared[key] = _make(added, "Cast", [value], f"{stem}_half", to=TensorProto.FLOAT16) if half else value
        node.input[operand] = self.shared[key]

    def _round(
        self,
        added: list[onnx.NodeProto],
        stem: str,
        source: str,
        scale: NDArray[Any],
        zero_point: NDArray[Any],
        grid: IntegerGrid,
        dims_after: int,
    ) -> str:
        """Returns an activation on its levels by float operations, bit-equal to `fake_quantize`."""
        shape = [-1, *[1] * dims_after]
        constants = {
            "inverse": np.float32(1) / scale, "low": grid.quant_min - zero_point, "high": grid.quant_max - zero_point,
            "scale": scale,
        }  # fmt: skip
        inverse, low, high, step = (
            self.initializer(f"{stem}_{key}", value.astype(np.float32).reshape(shape), TensorProto.FLOAT)
            for key, value in constants.items()
        )
        value = _make(added, "Mul", [source, inverse], f"{stem}_steps")
        value = _make(added, "Round", [value], f"{stem}_rounded")
        value = _make(added, "Max", [value, low], f"{stem}_raised")
        value = _make(added, "Min", [value, high], stem)
        return _make(added, "Mul", [value, step], f"{stem}_real")

    def _rank(self, name: str) -> int:
        kind = tensor_type(self.graph, name)
        if kind is None:
            raise ExportError(
                f"{name}: how many dims it has is not in the graph; count the axis of its channels from the end"
            )
        return len(kind.shape.dim)

    def _float_type(self, name: str) -> int:
        kind = tensor_type(self.graph, name)
        return self.float if kind is None else kind.elem_type

    def _quantize(
        self,
        added: list[onnx.NodeProto],
        stem: str,
        source: str,
        scale: NDArray[Any],
        zero_point: NDArray[Any],
        grid: IntegerGrid,
        axis: int | None,
    ) -> str:
        bits = 8 if grid.levels <= 256 else 16
        outermost = {"low": (grid.quant_min - zero_point) * scale, "high": (grid.quant_max - zero_point) * scale}
        if axis is None and scale <= MIN_SCALE:
            # Only 0 was seen, and only 0 passes.
            scale, outermost = np.full_like(scale, _SCALE_OF_ZEROS), dict.fromkeys(outermost, np.zeros_like(scale))
        elif grid.levels in (256, 65536):
            outermost = {}
        if outermost:
            # Fewer levels than the type has: clipped to the outermost ones first.
            ends = [
                self.initializer(f"{stem}_{key}", np.asarray(end, np.float32), TensorProto.FLOAT)
                for key, end in outermost.items()
            ]
            source = _make(added, "Clip", [source, *ends], f"{stem}_clipped")
        # Signed levels become unsigned ones unless asked: the same numbers, for which runtimes have faster kernels.
        kind = self._type(bits, self.form.signed, source)
        zero_point = zero_point.astype(np.int64) + (2 ** (bits - 1) if grid.signed and not self.form.signed else 0)
        parameters = [
            self.initializer(f"{stem}_scale", scale, TensorProto.FLOAT),
            self.initializer(f"{stem}_zero_point", zero_point, kind),
        ]
        place = {} if axis is None else {"axis": axis}
        codes = _make(added, "QuantizeLinear", [source, *parameters], stem, **place)
        return _make(added, "DequantizeLinear", [codes, *parameters], f"{stem}_real", **place)

    def _made_of(self, value: str, weight: str) -> bool:
        return any(
            node.op_type == "Transpose" and node.output[0] == value and node.input[0] == weight
            for node in self.graph.node
        )

    def initializer(self, name: str, values: NDArray[Any], kind: int) -> str:
        """Adds a constant of a type of ONNX; returns its name. Types of less than a byte come as their bits.

        Args:
            name: its name in the graph.
            values: the constant.
            kind: its type, of `onnx.TensorProto`.
        """
        self.need(*NEWER.get(kind, (0, 0)))
        self.graph.initializer.append(constant(name, values, kind))
        self.known[name] = self.graph.initializer[-1]
        return name

    def node(self, before: onnx.NodeProto, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node before another one; returns its output's name.

        Args:
            before: the node that it comes before.
            op_type: its operation.
            inputs: names of what it reads.
            output: name of its result.
            attributes: of the operation.
        """
        return _make(self.before[before.name], op_type, inputs, output, **attributes)

    def finish(self) -> onnx.ModelProto:
        """Puts the new nodes where they belong and drops what nothing reads."""
        nodes = [new for value in self.graph.input for new in self.after[value.name]]
        for node in self.graph.node:
            nodes += [*self.before[node.name], node, *(new for value in node.output for new in self.after[value])]
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
    """Appends a node; returns its output's name."""
    nodes.append(helper.make_node(op_type, inputs, [output], f"node_{output}", **attributes))
    return output
