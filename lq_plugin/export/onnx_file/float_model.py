"""Start of an export: a float copy of the model, and its ONNX graph as torch makes it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lq_plugin.errors import ExportError
from lq_plugin.export.quiet import quiet
from lq_plugin.model.copies import copy_model
from lq_plugin.model.prepare import remove

#: The first one with 4-bit types and blocks of scales.
OPSET = 21


def float_graph(
    plain: nn.Module,
    inputs: tuple[Any, ...],
    shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """Returns a float model as an ONNX graph whose initializers keep the names of the parameters.

    Args:
        plain: float, on the CPU.
        inputs: positional arguments, as an example.
        shapes: dynamic dims, as `torch.onnx.export` takes them; None: all are fixed.
        input_names, output_names: of the graph; None: torch's.

    Raises:
        ExportError: torch has no graph for it.
    """
    # They log every step, warn of packages that could be installed, and print the graph of a failure. Without
    # gradients: with them torch decomposes attention over a learned bias in a way that the exporter cannot follow.
    heard = io.StringIO()
    with (
        quiet("torch", "torch.onnx", "onnx_ir", "onnxscript"),
        contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), torch.no_grad(),
    ):  # fmt: skip
        # torch takes a mapping at the end for keyword arguments, unless another one follows.
        given = (*inputs, {}) if inputs and isinstance(inputs[-1], dict) else inputs
        try:
            program = torch.onnx.export(
                plain, given, dynamo=True, optimize=False, opset_version=OPSET, dynamic_shapes=shapes, verbose=False,
                input_names=input_names, output_names=output_names,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"torch cannot make an ONNX graph of {type(plain).__name__}: {_reason(error)}") from error
    assert program is not None
    return program.model_proto


def _reason(error: BaseException) -> str:
    """Returns the root of an error, and the line of the model where it happened, if that is told."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line for line in lines if line), "")
    place = [line for line in lines if line.startswith("File ")][-1:]
    return f"{type(error).__name__}: {said}" + "".join(f" ({line}: {lines[lines.index(line) + 1]})" for line in place)


def float_copy(model: nn.Module) -> nn.Module:
    """Returns `inference_copy` without quantizers."""
    plain = inference_copy(model)
    remove(plain)
    return plain


def inference_copy(model: nn.Module) -> nn.Module:
    """Returns a copy on the CPU in evaluation mode, without the Trainer that a LightningModule may hold."""
    return copy_model(model).eval().cpu()
