"""Linter of ONNX files for TensorRT: one named rule a check, each with the page it comes from.

The rules are those of explicit quantization in strongly typed networks, the only kind of TensorRT 11: the precision of
each operation is in the graph. They are read from documentation, not tried in TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from lq_plugin.errors import ExportError
from lq_plugin.export.tensorrt.view import QDQ, QUANTIZED, View, type_name

_DOCS = "https://docs.nvidia.com/deeplearning/tensorrt/latest"
TYPES = f"{_DOCS}/inference-library/work-quantized-types.html"
SCHEMES = f"{_DOCS}/inference-library/quantized-types-schemes.html"
EXPLICIT = f"{_DOCS}/inference-library/quantized-types-explicit-quantization.html"
QUANTIZE = f"{_DOCS}/_static/operators/Quantize.html"
OPSETS = f"{_DOCS}/reference/onnx-opset-guide.html"
LAYER = (
    "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/_static/cpp-api/classnvinfer1_1_1_i_quantize_layer.html"
)
#: Of release 10.1, the newest one that could be read.
OPERATORS = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
PARSER = "https://github.com/onnx/onnx-tensorrt/blob/main/onnxOpImporters.cpp"


class Finding(NamedTuple):
    """Broken rule.

    Args:
        rule: its name.
        node: name of the node or tensor.
        message: what is wrong there.
    """

    rule: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message} [{self.rule}]"


class LintRule(NamedTuple):
    """One check.

    Args:
        name: for findings.
        sentence: what the rule says.
        source: the page that says so.
        check: yields the node and the fault of everything in a graph that breaks it.
    """

    name: str
    sentence: str
    source: str
    check: Callable[[View], Iterator[tuple[str, str]]]


#: By name.
RULES: dict[str, LintRule] = {}

_Check = Callable[[View], Iterator[tuple[str, str]]]


def lint(model: str | Path | onnx.ModelProto) -> list[Finding]:
    """Returns the rules that an ONNX model breaks, in the order of the rules; none: it keeps them all.

    Args:
        model: any ONNX model, or the path of its file.

    Raises:
        ExportError: there is no such file, or it is no ONNX model.
    """
    if not isinstance(model, onnx.ModelProto):
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        if not Path(model).is_file():
            raise ExportError(f"cannot open {model}: no such file")
        try:
            model = onnx.load(model)
        except DecodeError as error:
            raise ExportError(f"{model} is no ONNX file, or a damaged one: {error}") from error
    view = View(model)
    return [Finding(rule.name, *found) for rule in RULES.values() for found in rule.check(view)]


def _rule(name: str, sentence: str, source: str) -> Callable[[_Check], _Check]:
    def add(check: _Check) -> _Check:
        RULES[name] = LintRule(name, sentence, source, check)
        return check

    return add


@_rule("opset", "The opset is 9 to 25.", OPSETS)
def _opset(view: View) -> Iterator[tuple[str, str]]:
    if not 9 <= view.opset <= 25:
        yield "model", f"opset {view.opset}"


@_rule("integer-operator", "Products are those of float operators between Q/DQ nodes.", OPERATORS)
def _integer_operator(view: View) -> Iterator[tuple[str, str]]:
    unknown = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
    for node in view.nodes:
        if node.op_type in unknown:
            yield node.name, f"TensorRT has no {node.op_type}"


@_rule("tensor-type", "Tensors are FP32, FP16, BF16, INT32, INT64, BOOL or quantized types.", OPERATORS)
def _tensor_type(view: View) -> Iterator[tuple[str, str]]:
    plain = (
        TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT32, TensorProto.INT64,
        TensorProto.BOOL,
    )  # fmt: skip
    for name, kind in view.types.items():
        # What becomes quantized has a rule of its own. UINT8 is a type of inputs and outputs.
        if kind in (*plain, *QUANTIZED) or name in view.codes or (kind == TensorProto.UINT8 and name in view.outside):
            continue
        yield name, f"type {type_name(kind)}"


@_rule("quantized-type", "Quantized tensors are INT8, INT4, FP8E4M3 or FP4E2M1: there is no unsigned type.", TYPES)
def _quantized_type(view: View) -> Iterator[tuple[str, str]]:
    for node in view.pairs:
        kind = view.quantized_type(node)
        if kind not in QUANTIZED:
            yield node.name, f"{type_name(kind)} is no quantized type of TensorRT"


@_rule("quantized-reader", "Quantized tensors are read by DequantizeLinear alone.", EXPLICIT)
def _quantized_reader(view: View) -> Iterator[tuple[str, str]]:
    for node in view.nodes:
        for position, name in enumerate(node.input):
            codes = name in view.codes or view.types.get(name) in QUANTIZED
            if codes and not (node.op_type in QDQ and (position == 2 or node.op_type == "DequantizeLinear")):
                yield node.name, f"{node.op_type} reads the quantized tensor {name}"


@_rule("zero-point", "Quantization is symmetric: zero points are constants of zeros.", LAYER)
def _zero_point(view: View) -> Iterator[tuple[str, str]]:
    for node in view.pairs:
        if len(node.input) == 3 and node.input[2]:
            value = view.constant(node.input[2])
            if value is None:
                yield node.name, f"the zero point {node.input[2]} is computed"
            elif value.astype(np.float32).any():
                yield node.name, f"zero point {value.reshape(-1)[np.flatnonzero(value)[0]]}"


@_rule("constant-scale", "Scales are build-time constants.", QUANTIZE)
def _constant_scale(view: View) -> Iterator[tuple[str, str]]:
    for node in view.pairs:
        if view.constant(node.input[1]) is None:
            yield node.name, f"the scale {node.input[1]} is computed"


@_rule("positive-scale", "All scales are strictly positive.", LAYER)
def _positive_scale(view: View) -> Iterator[tuple[str, str]]:
    for node, scale in view.scales():
        bad = scale[~((scale > 0) & np.isfinite(scale))]
        if bad.size:
            yield node.name, f"{bad.size} scales are not positive, such as {bad.reshape(-1)[0]:g}"


@_rule("scale-type", "Scales are FP32, FP16 or BF16, and of the type of what is quantized.", QUANTIZE)
def _scale_type(view: View) -> Iterator[tuple[str, str]]:
    for node in view.pairs:
        kind = view.types.get(node.input[1])
        if kind is not None and kind not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            yield node.name, f"scale of type {type_name(kind)}"
        read = view.types.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if None not in (kind, read) and read != kind:
            yield node.name, f"a {type_name(read)} tensor has a scale of type {type_name(kind)}"


@_rule("scale-shape", "A scale is one number, one for each index of the axis, or one for each block.", LAYER)
def _scale_shape(view: View) -> Iterator[tuple[str, str]]:
    for node, scale in view.scales():
        shape = view.shapes.get(node.input[0])
        if shape is None or scale.size == 1 or view.block(node):
            continue
        axis = view.axis(node)
        if scale.ndim != 1 or not -len(shape) <= axis < len(shape):
            yield node.name, f"scales of shape {list(scale.shape)} along axis {axis} of {list(shape)}"
        elif shape[axis] not in (None, len(scale)):
            yield node.name, f"{len(scale)} scales for the {shape[axis]} indices of axis {axis}"


@_rule("activation-scale", "Activations have one scale.", PARSER)
def _activation_scale(view: View) -> Iterator[tuple[str, str]]:
    for node, scale in view.scales():
        if scale.size > 1 and not view.is_constant(node.input[0]):
            yield node.name, f"{scale.size} scales of the activation {node.input[0]}"


@_rule("weight-axis", "The scales of a weight belong to its output channels.", PARSER)
def _weight_axis(view: View) -> Iterator[tuple[str, str]]:
    for node, scale in view.scales():
        shape = view.shapes.get(node.input[0])
        if node.op_type != "DequantizeLinear" or scale.size == 1 or view.block(node) or shape is None:
            continue
        for reader in view.readers.get(node.output[0], ()):
            channels = view.output_axis(reader, node.output[0], len(shape))
            if channels is not None and view.axis(node) % len(shape) != channels:
                yield node.name, f"axis {view.axis(node)}, {reader.op_type} has its output channels along {channels}"


@_rule("block-shape", "Blocks divide one of the last two dims.", LAYER)
def _block_shape(view: View) -> Iterator[tuple[str, str]]:
    for node, scale in view.scales():
        shape, size = view.shapes.get(node.input[0]), view.block(node)
        if not size or shape is None:
            continue
        axis = view.axis(node) % len(shape)
        length = shape[axis]
        if axis < len(shape) - 2:
            yield node.name, f"blocks along axis {axis} of {len(shape)} dims"
        elif length is not None and length % size:
            yield node.name, f"blocks of {size} do not divide {length}"
        elif length is not None and scale.shape != (*shape[:axis], length // size, *shape[axis + 1 :]):
            yield node.name, f"scales of shape {list(scale.shape)} for blocks of {size} in {list(shape)}"


@_rule("int4-blocks", "INT4 has a scale for each block of 64 or 128 elements.", SCHEMES)
def _int4_blocks(view: View) -> Iterator[tuple[str, str]]:
    for node in view.pairs:
        if view.quantized_type(node) == TensorProto.INT4 and view.block(node) not in (64, 128):
            yield node.name, f"INT4 in blocks of {view.block(node)}" if view.block(node) else "INT4 without blocks"


@_rule("int4-weights", "INT4 is a type of weights: the other operand stays float.", SCHEMES)
def _int4_weights(view: View) -> Iterator[tuple[str, str]]:
    for node in view.pairs:
        if view.quantized_type(node) != TensorProto.INT4:
            continue
        if not view.is_constant(node.input[0]):
            yield node.name, f"the activation {node.input[0]} is INT4"
        for reader in view.readers.get(node.output[0], ()):
            others = [name for name in reader.input if name != node.output[0]]
            if any(name in view.producer and view.producer[name].op_type in QDQ for name in others):
                yield reader.name, f"{reader.op_type} of INT4 weights has a quantized operand"


@_rule("int4-even", "The last dim of INT4 tensors is even.", PARSER)
def _int4_even(view: View) -> Iterator[tuple[str, str]]:
    for node in view.pairs:
        shape: Sequence[int | None] = view.shapes.get(node.input[0]) or (None,)
        if view.quantized_type(node) == TensorProto.INT4 and shape[-1] is not None and shape[-1] % 2:
            yield node.name, f"INT4 of shape {list(shape)}"
