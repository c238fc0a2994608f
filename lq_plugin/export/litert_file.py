"""TensorFlow Lite files: every tensor between the quantized layers is a signed byte, inputs and outputs also.

`litert_torch` converts the integer program. Its converter folds a weight's quantize node, makes biases int32 in steps
of input scale times weight scale, and takes the quantize nodes at the ends into the model's interface.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq_plugin.errors import ExportError
from lq_plugin.export.integer_program.build import integer_program
from lq_plugin.export.integer_program.form import IntegerForm
from lq_plugin.export.integer_program.pieces import example, in_pieces
from lq_plugin.export.quiet import quiet
from lq_plugin.export.target import Products, Reader
from lq_plugin.model.copies import copy_model
from lq_plugin.utilities.files import replacing

#: Operations of TensorFlow Lite's 8-bit specification
#: (https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec), with its fixed scales.
TFLITE = IntegerForm(
    "LiteRT",
    frozenset({
        "aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.mean.dim", "aten.cat.default",
        "aten.relu.default", "aten.hardtanh.default", "aten.hardswish.default", "aten.leaky_relu.default",
        "aten.sigmoid.default", "aten.tanh.default", "aten.softmax.int", "aten.gelu.default",
    }),
    moves=frozenset({"aten.avg_pool2d.default"}),
    fused=frozenset({"aten.relu.default", "aten.hardtanh.default"}),
    fixed={
        "aten.sigmoid.default": (1 / 256, -128), "aten.softmax.int": (1 / 256, -128), "aten.tanh.default": (1 / 128, 0),
    },
    loses_roundings=True,
    float_weights=True,
)  # fmt: skip
_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


def export_litert(
    model: nn.Module, inputs: Sequence[Any], path: str | Path, batches: Sequence[Any] | None = None, batch: int = 1
) -> int:
    """Writes a prepared and calibrated model as a TensorFlow Lite file.

    Args:
        model: with specs that the target `litert` takes; it is not changed.
        inputs: positional arguments of its forward, as an example.
        path: of the file.
        batches: calibration batches, see `integer_program`.
        batch: samples that the file takes at a time; 0: tensors of the example's shapes.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: see `integer_program`; or the converter leaves a layer float. No file is written then.
    """
    inputs = example(inputs, batch)
    program = integer_program(model, inputs, batches, TFLITE)
    content = _converted(program, inputs)
    expected = sum("dequantize_per_channel" in str(node.target) for node in program.graph.nodes)
    if (found := sum(set(types) == {"INT8"} for _, types in products(content))) != expected:
        raise ExportError(f"litert_torch made integers of {found} layers, of {expected} that the plan quantizes")
    with replacing(path, ExportError) as stream:
        stream.write(content)
    return len(content)


def float_litert(model: nn.Module, inputs: Sequence[Any], path: str | Path) -> int:
    """Writes a float model as a TensorFlow Lite file, as its users would: to compare a quantized one with.

    Args:
        model: float; it is not changed.
        inputs: positional arguments of its forward; the file takes tensors of these shapes.
        path: of the file.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: litert_torch cannot convert it.
    """
    content = _file(copy_model(model).eval(), tuple(inputs), None)
    with replacing(path, ExportError) as stream:
        stream.write(content)
    return len(content)


class _Program(nn.Module):
    """Module that runs a program, and is in evaluation mode: a program's own module refuses to be asked for it."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)
        self.training = False

    def forward(self, *args: Any) -> Any:
        return self.program(*args)

    def train(self, mode: bool = True) -> _Program:
        return self


def _converted(program: Any, inputs: tuple[Any, ...]) -> bytes:
    """Returns a program as the bytes of a file."""
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    # Nothing is quantized by it: it says that the graph has static scales.
    how = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    return _file(_Program(program), inputs, how)


def _file(model: nn.Module, inputs: tuple[Any, ...], how: Any) -> bytes:
    """Returns what the converter makes of a model, quietly."""
    import litert_torch

    heard = io.StringIO()
    with (
        quiet("torch", "litert_torch"), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard),
        tempfile.TemporaryDirectory() as folder,
    ):  # fmt: skip
        try:
            made = litert_torch.convert(model, inputs, quant_config=how)
        except ValueError as error:
            raise ExportError(f"litert_torch cannot convert the program: {error}") from error
        made.export(str(Path(folder) / "model.tflite"))
        return (Path(folder) / "model.tflite").read_bytes()


def litert_products(path: Path) -> Products:
    """Returns the products of a file: integer ones multiply signed bytes by signed bytes and write such.

    Args:
        path: of the file.
    """
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, types in products(path.read_bytes()):
        found[set(types) == {"INT8"}][name] += 1
    return Products(dict(found[True]), dict(found[False]))


def products(content: bytes) -> list[tuple[str, list[str]]]:
    """Returns the products of a file, in order: operator, and the types of input, weight and output.

    Args:
        content: of the file.
    """
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    types = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    found = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            name = names[model.operatorCodes[operator.opcodeIndex].builtinCode]
            if name in _PRODUCTS:
                # A transposed convolution reads the shape of its result first.
                read = [2, 1] if name == "TRANSPOSE_CONV" else [0, 1]
                tensors = [operator.inputs[index] for index in read] + [operator.outputs[0]]
                found.append((name, [types[graph.tensors[index].type] for index in tensors]))
    return found


def open_litert(path: Path, threads: int = 1) -> Reader:
    """Returns a reader of a file that runs it in LiteRT's interpreter.

    Args:
        path: of the file.
        threads: of the interpreter.

    Raises:
        ExportError: it is no TensorFlow Lite file.
    """
    interpreter = _interpreter(path, threads)
    runner = interpreter.get_signature_runner()
    inputs, outputs = (_in_order(details) for details in (runner.get_input_details(), runner.get_output_details()))

    def run(*args: Any) -> list[Tensor]:
        given = [x.detach().cpu().numpy() for x in tree_leaves(args) if isinstance(x, Tensor)]
        feed = {name: _stored(x, detail) for (name, detail), x in zip(inputs, given, strict=True)}
        found = runner(**feed)
        return [torch.from_numpy(_real(found[name], detail)) for name, detail in outputs]

    size = int(inputs[0][1]["shape"][0]) if inputs and len(inputs[0][1]["shape"]) else None
    return Reader(in_pieces(run, size), len(inputs))


def timed_litert(path: Path, inputs: Sequence[Any], threads: int) -> Callable[[], None]:
    """Returns a function that runs a file once on the same inputs, without what Python does to numbers around it.

    Args:
        path: of the file.
        inputs: positional arguments of the model.
        threads: of the interpreter.
    """
    interpreter = _interpreter(path, threads)
    details = _in_order(interpreter.get_signature_runner().get_input_details())
    given = [x.detach().cpu().numpy() for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    for (_, detail), x in zip(details, given, strict=True):
        interpreter.set_tensor(detail["index"], _stored(x, detail))
    run: Callable[[], None] = interpreter.invoke
    return run


def _interpreter(path: Path, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(str(path), num_threads=threads)
    except ValueError as error:
        raise ExportError(f"{path} is no TensorFlow Lite file: {error}") from error
    interpreter.allocate_tensors()
    return interpreter


def _in_order(details: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns inputs or outputs as the model has them: `args_0`, `args_1`, ..., `args_10`."""
    return sorted(details.items(), key=lambda item: [int(part) for part in item[0].split("_") if part.isdigit()])


def _stored(x: NDArray[Any], detail: Any) -> NDArray[Any]:
    """Returns an input on the file's levels, where it has some."""
    scale, zero_point = detail["quantization"]
    if not scale:
        return x.astype(detail["dtype"])
    limits = np.iinfo(detail["dtype"])
    codes: NDArray[Any] = np.clip(np.round(x / np.float32(scale)) + zero_point, limits.min, limits.max)
    return codes.astype(detail["dtype"])


def _real(y: NDArray[Any], detail: Any) -> NDArray[Any]:
    """Returns an output as real numbers."""
    scale, zero_point = detail["quantization"]
    real: NDArray[Any] = (y.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
    return real if scale else y
