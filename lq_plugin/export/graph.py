"""Changes to an ONNX graph: weights as whole numbers, activations through QuantizeLinear and back."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.export.containers import Container
from lq_plugin.spec import IntegerGrid

_TYPES = {
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}
_CONV = ("Conv", "ConvTranspose")


class Graph:
    """An exported model whose initializers have the names of the parameters.

    Args:
        model: changed in place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self.known = {tensor.name: tensor for tensor in self.graph.initializer}
        self.added: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.shared: dict[tuple[Any, ...], str] = {}

    def consumer(self, name: str, layer: Any) -> tuple[onnx.NodeProto, bool]:
        """The one node that uses a layer's weight, and whether it does so through a Transpose.

        Raises:
            ExportError: when there is none, or several.
        """
        weight = f"{name}.weight"
        users = [node for node in self.graph.node if weight in node.input and node.op_type not in ("Shape", "CastLike")]
        transposed = len(users) == 1 and users[0].op_type == "Transpose"
        if transposed:
            users = [node for node in self.graph.node if users[0].output[0] in node.input]
        if len(users) != 1:
            kinds = ", ".join(node.op_type for node in users) or "none"
            raise ExportError(f"{weight} is used by {len(users)} nodes of the exported graph ({kinds}), one is supported")
        if users[0].op_type == "Conv" and layer.bias is None and len(users[0].input) == 3:
            users[0].input.pop()  # the exporter makes zeros of it
        return users[0], transposed

    def put_weight(self, name: str, node: onnx.NodeProto, content: tuple[Container, bool], through_transpose: bool) -> None:
        """Let `node` read the weight from whole numbers."""
        weight, exchanged = content
        flipped = exchanged != through_transpose
        source = f"{name}.weight"
        position = next(i for i, value in enumerate(node.input) if value == source or self._made_of(value, source))
        q = weight.q.transpose(0, 1) if flipped else weight.q
        if weight.table is not None:
            indices = self._initializer(f"{name}.weight_codes", q.numpy().astype(np.uint8), TensorProto.UINT8)
            table = self._initializer(f"{name}.weight_table", weight.table.numpy(), TensorProto.FLOAT)
            wide = self._node(node, "Cast", [indices], f"{name}.weight_index", to=TensorProto.INT32)
            node.input[position] = self._node(node, "Gather", [table, wide], f"{name}.weight_dequantized")
            return
        kind = _TYPES[weight.bits, weight.signed]
        scale, zero_point = weight.scale, weight.zero_point
        assert scale is not None
        factor = self._absorb_batch_norm(name, node)
        if factor is not None:
            scale = scale.expand(len(factor)) if scale.ndim == 0 else scale
            scale = scale * factor.view(-1, *[1] * (scale.ndim - 1))
            zero_point = zero_point.expand(len(factor)) if zero_point is not None and zero_point.ndim == 0 else zero_point
        if weight.block and flipped:
            scale = scale.transpose(0, 1)
            zero_point = None if zero_point is None else zero_point.transpose(0, 1)
        codes = self._initializer(f"{name}.weight_codes", q.contiguous().numpy(), kind)
        if node.op_type in _CONV and weight.bits == 4:
            # Runtimes have integer kernels of convolutions for 8 bits: a cast on loading, the file stays small.
            kind = TensorProto.INT8 if weight.signed else TensorProto.UINT8
            codes = self._node(node, "Cast", [codes], f"{name}.weight_int8", to=kind)
        inputs = [codes, self._initializer(f"{name}.weight_scale", scale.contiguous().numpy(), TensorProto.FLOAT)]
        if zero_point is not None:
            inputs.append(self._initializer(f"{name}.weight_zero_point", zero_point.contiguous().numpy(), kind))
        place = {"axis": (0 if flipped else 1) if weight.block else (1 if flipped else 0)} if scale.ndim else {}
        if weight.block:
            place["block_size"] = weight.block
        node.input[position] = self._node(node, "DequantizeLinear", inputs, f"{name}.weight_dequantized", **place)

    def put_activation(self, node: onnx.NodeProto, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, axis: int | None) -> None:
        """Quantize what `node` reads, its first input; readers of one tensor with the same qparams share the nodes."""
        source = node.input[0]
        key = (source, scale.numpy().tobytes(), zero_point.numpy().tobytes(), grid, axis)
        if key not in self.shared:
            self.shared[key] = self._quantize(node, source, scale.numpy(), zero_point.numpy(), grid, axis)
        node.input[0] = self.shared[key]

    def _quantize(
        self, before: onnx.NodeProto, source: str, scale: NDArray[Any], zero_point: NDArray[Any], grid: IntegerGrid, axis: int | None
    ) -> str:
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
            source = self._node(before, "Clip", [source, *ends], f"{stem}_clipped")
        kind = _TYPES[bits, grid.signed]
        parameters = [
            self._initializer(f"{stem}_scale", scale, TensorProto.FLOAT),
            self._initializer(f"{stem}_zero_point", zero_point.astype(np.int64), kind),
        ]
        place = {} if axis is None else {"axis": axis}
        codes = self._node(before, "QuantizeLinear", [source, *parameters], stem, **place)
        return self._node(before, "DequantizeLinear", [codes, *parameters], f"{stem}_real", **place)

    def _absorb_batch_norm(self, name: str, node: onnx.NodeProto) -> Any:
        """Factors that a following batch norm brings to the output channels; its shift goes to the bias. None: there is none."""
        if node.op_type != "Conv":
            return None
        followers = [other for other in self.graph.node if node.output[0] in other.input]
        if len(followers) != 1 or followers[0].op_type != "BatchNormalization":
            return None
        norm = followers[0]
        if any(value not in self.known for value in norm.input[1:5]):
            return None
        weight, shift, mean, variance = (numpy_helper.to_array(self.known[value]).astype(np.float64) for value in norm.input[1:5])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = weight / np.sqrt(variance + epsilon)
        if (factor <= 0).any():
            return None
        bias = numpy_helper.to_array(self.known[node.input[2]]).astype(np.float64) if len(node.input) == 3 else 0.0
        moved = self._initializer(f"{name}.bias_folded", ((bias - mean) * factor + shift).astype(np.float32), TensorProto.FLOAT)
        del node.input[2:]
        node.input.append(moved)
        for other in self.graph.node:
            for index, value in enumerate(other.input):
                if value == norm.output[0]:
                    other.input[index] = node.output[0]
        for output in self.graph.output:
            if output.name == norm.output[0]:
                node.output[0] = output.name
        self.graph.node.remove(norm)
        return torch.from_numpy(factor.astype(np.float32))

    def _made_of(self, value: str, weight: str) -> bool:
        return any(node.op_type == "Transpose" and node.output[0] == value and node.input[0] == weight for node in self.graph.node)

    def _initializer(self, name: str, values: NDArray[Any], kind: int) -> str:
        if kind in (TensorProto.INT4, TensorProto.UINT4):
            flat = values.astype(np.int8).reshape(-1) & 0xF
            flat = np.append(flat, np.zeros(flat.size % 2, flat.dtype)).astype(np.uint8)
            tensor = TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=(flat[::2] | flat[1::2] << 4).tobytes())
        else:
            tensor = numpy_helper.from_array(np.ascontiguousarray(values.astype(helper.tensor_dtype_to_np_dtype(kind))), name)
        self.graph.initializer.append(tensor)
        self.known[name] = self.graph.initializer[-1]
        return name

    def _node(self, before: onnx.NodeProto, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.added[before.name].append(helper.make_node(op_type, inputs, [output], f"node_{output}", **attributes))
        return output

    def save(self, path: str | Path) -> None:
        """Put the new nodes where they belong, drop what nothing reads, check, write."""
        nodes = [new for node in self.graph.node for new in (*self.added.get(node.name, ()), node)]
        used = {value.name for value in self.graph.output}
        alive: list[onnx.NodeProto] = []
        for node in reversed(nodes):
            if used.intersection(node.output):
                alive.append(node)
                used.update(node.input)
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
        onnx.checker.check_model(self.model, full_check=True)
        onnx.save(self.model, path)
