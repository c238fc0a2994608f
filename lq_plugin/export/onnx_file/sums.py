"""Integers through residual sums, so that no float operation stands between two integer convolutions.

A plan quantizes what layers read. The sum of a residual block reads a convolution's output as it is, in float, and a
runtime has an integer kernel only for a convolution whose output is quantized as well:

    before   Conv ─────────────► Add ─► Relu ─► Q ─► DQ ─► Conv
    after    Conv ─► Q ─► DQ ─► Add ─► Relu ─► Q ─► DQ ─► Conv
              (shortcut, in float) ──┘                                             (shortcut) ─► DQ ─┘

Here both operands and the result of such sums get a QuantizeLinear and a DequantizeLinear of 8 bits, their ranges found
on calibration data, by running the file. A shortcut that leads from a tensor which is quantized to 8 bits already reads
that one; slices and zero pads on its way then move integers. Where only layers of other levels read the
sum (16 bits, a scale for each channel), theirs alone are in force. This is more rounding than the plan asks for:
compare with `lq_plugin.export.verify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lq_plugin.errors import ExportError
from lq_plugin.export.onnx_file.queries import names_read, readers_by_name
from lq_plugin.export.runtime import onnx_session
from lq_plugin.functional.affine import qparams_from_bounds
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.ranges import Histogram, estimate_range

Feed: TypeAlias = Mapping[str, NDArray[Any]]

_UNSIGNED, _SIGNED = QuantSpec.parse("uint8 affine").grid, QuantSpec.parse("int8").grid
_BYTES = (TensorProto.UINT8, TensorProto.INT8)
#: Operations that only move values, and so also integers.
_MOVES = ("Slice", "Pad")
#: Operations that a runtime applies to a sum before it rounds it.
_AFTER = ("Relu", "Clip")


def quantize_sums(model: onnx.ModelProto, feeds: Iterable[Feed], signed: bool = False) -> int:
    """Quantizes operands and results of sums after integer convolutions, in place.

    Args:
        model: made by `export_onnx`.
        feeds: calibration batches, arrays by input name.
        signed: in signed integers with zero point 0, as the file's other activations; False: unsigned ones.

    Returns:
        The number of quantized sums.

    Raises:
        ExportError: without batches.
    """
    graph = _Sums(model, signed)
    sums = graph.find()
    if sums:
        graph.quantize(sums, feeds)
    return len(sums)


class _Sums:
    def __init__(self, model: onnx.ModelProto, signed: bool) -> None:
        self.model, self.graph = model, model.graph
        self.grid = _SIGNED if signed else _UNSIGNED
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.after: dict[str, list[onnx.NodeProto]] = {}
        self.producer = {name: node for node in self.graph.node for name in node.output}
        self.readers = readers_by_name(self.graph)

    def find(self) -> list[onnx.NodeProto]:
        """Returns sums of two computed tensors, one of them an integer convolution that nothing else reads."""
        found = []
        for node in self.graph.node:
            if node.op_type != "Add" or any(name in self.constants for name in node.input):
                continue
            if any(self._is_integer_conv(name) and len(self.readers[name]) == 1 for name in node.input):
                found.append(node)
        return found

    def quantize(self, sums: list[onnx.NodeProto], feeds: Iterable[Feed]) -> None:
        operands = {self._origin(name) for node in sums for name in node.input}
        # What every reader rounds to levels of its own gets no others before: of two pairs in a row ONNX Runtime (1.32)
        # may take one.
        results = {name for name in map(self._result, sums) if self._codes(name) or not self._is_quantized(name)}
        wanted = sorted(operands | results)
        unknown = [name for name in wanted if self._codes(name) is None]
        ranges = self._ranges(unknown, feeds)
        real = {name: self._through_codes(name, ranges.get(name)) for name in wanted}
        for node in sums:
            for index, name in enumerate(node.input):
                node.input[index] = self._moved(name, real)
        for name, (quantizer, dequantized) in real.items():
            for reader in self.readers.get(name, []):
                if reader is not quantizer and reader.op_type != "QuantizeLinear":
                    reader.input[:] = [dequantized if value == name else value for value in reader.input]
        self._rebuild()

    def _is_quantized(self, name: str) -> bool:
        readers = self.readers.get(name, [])
        return bool(readers) and all(node.op_type == "QuantizeLinear" for node in readers)

    def _is_integer_conv(self, name: str) -> bool:
        node = self.producer.get(name)
        return node is not None and node.op_type == "Conv" and all(self._reads_whole(value) for value in node.input[:2])

    def _reads_whole(self, name: str) -> bool:
        node = self.producer.get(name)
        return node is not None and node.op_type == "DequantizeLinear"

    def _origin(self, name: str) -> str:
        """Returns the tensor that an operand is a slice or zero-padded copy of, where only the sum reads the copy."""
        while (node := self.producer.get(name)) is not None and node.op_type in _MOVES and self._is_plain_move(node):
            name = node.input[0]
        return name

    def _is_plain_move(self, node: onnx.NodeProto) -> bool:
        if len(self.readers[node.output[0]]) != 1:
            return False
        if node.op_type == "Slice":
            return True
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        value = node.input[2] if len(node.input) > 2 else ""
        zero = not value or (value in self.constants and not numpy_helper.to_array(self.constants[value]).any())
        return mode == b"constant" and zero

    def _result(self, node: onnx.NodeProto) -> str:
        name = node.output[0]
        readers = self.readers.get(name, [])
        return str(readers[0].output[0]) if len(readers) == 1 and readers[0].op_type in _AFTER else name

    def _codes(self, name: str) -> onnx.NodeProto | None:
        """Returns the QuantizeLinear to 8 bits, with one scale, that reads a tensor already, or None."""
        for node in self.readers.get(name, []):
            if node.op_type == "QuantizeLinear" and node.input[0] == name:
                zero_point = self.constants.get(node.input[2])
                if zero_point is not None and zero_point.data_type in _BYTES and not zero_point.dims:
                    return node
        return None

    def _ranges(self, names: list[str], feeds: Iterable[Feed]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """Returns scale and zero point of tensors, from running the graph with them as further outputs."""
        probe = onnx.ModelProto()
        probe.CopyFrom(self.model)
        known = {value.name for value in probe.graph.output}
        probe.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in known
        )
        session = onnx_session(probe.SerializeToString())
        histograms = {name: Histogram() for name in names}
        batches = 0
        for feed in feeds:
            batches += 1
            for name, value in zip(names, session.run(names, dict(feed)) if names else [], strict=True):
                histograms[name].update(torch.from_numpy(value))
        if not batches:
            raise ExportError("the ranges of residual sums need calibration data, there were no batches")
        found = {}
        for name, histogram in histograms.items():
            bounds = estimate_range("mse", histogram.sample(), self.grid)
            scale, zero_point = qparams_from_bounds(*bounds, self.grid)
            found[name] = (scale.reshape(()).numpy(), zero_point.reshape(()).numpy())
        return found

    def _through_codes(
        self, name: str, qparams: tuple[NDArray[Any], NDArray[Any]] | None
    ) -> tuple[onnx.NodeProto, str]:
        """Returns the QuantizeLinear of a tensor and the name of its dequantized value, made where there are none."""
        quantizer = self._codes(name)
        if quantizer is not None:
            return quantizer, next(
                node.output[0] for node in self.readers[quantizer.output[0]] if node.op_type == "DequantizeLinear"
            )
        assert qparams is not None
        scale, zero_point = qparams
        parameters = [f"{name}.sum_scale", f"{name}.sum_zero_point"]
        self._constant(parameters[0], scale.astype(np.float32))
        self._constant(parameters[1], zero_point.astype(np.int8 if self.grid.signed else np.uint8))
        quantizer = helper.make_node(
            "QuantizeLinear", [name, *parameters], [f"{name}.sum_codes"], f"node_{name}.sum_codes"
        )
        real = helper.make_node(
            "DequantizeLinear", [f"{name}.sum_codes", *parameters], [f"{name}.sum_real"], f"node_{name}.sum_real"
        )
        self.after.setdefault(name, []).extend((quantizer, real))
        return quantizer, real.output[0]

    def _moved(self, name: str, real: Mapping[str, tuple[onnx.NodeProto, str]]) -> str:
        """Returns an operand read from integers: slices and pads between it and its origin move those."""
        origin = self._origin(name)
        quantizer, dequantized = real[origin]
        if origin == name:
            return dequantized
        moves = []
        value = name
        while value != origin:
            moves.append(self.producer[value])
            value = moves[-1].input[0]
        source = quantizer.output[0]
        for move in reversed(moves):
            move.input[0] = source
            if move.op_type == "Pad":
                inputs = [*move.input[:2], quantizer.input[2], *move.input[3:]]
                del move.input[:]
                move.input.extend(inputs)
            source = f"{move.output[0]}.codes"
            move.output[0] = source
        result = helper.make_node(
            "DequantizeLinear", [source, *quantizer.input[1:3]], [f"{name}.sum_real"], f"node_{name}.sum_real"
        )
        self.after.setdefault(source, []).append(result)
        return str(result.output[0])

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.constants[name] = self.graph.initializer[-1]

    def _rebuild(self) -> None:
        """Puts new nodes into the graph and sorts it, so that everything is computed before it is read."""
        waiting = [*self.graph.node, *(node for nodes in self.after.values() for node in nodes)]
        made = {name for node in waiting for name in node.output}
        ready: set[str] = set()
        ordered: list[onnx.NodeProto] = []
        while waiting:
            now = []
            for node in waiting:
                if all(name in ready or name not in made for name in names_read(node)):
                    ordered.append(node)
                    ready.update(node.output)
                else:
                    now.append(node)
            assert len(now) < len(waiting), "a loop in the graph"
            waiting = now
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del self.graph.node[:]
        self.graph.node.extend(copies)
