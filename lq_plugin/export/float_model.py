"""What an export starts from: a float copy of the model, and its ONNX graph as torch makes it."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lq_plugin.export.quiet import quiet
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
    """A float model as an ONNX graph whose initializers keep the names of the parameters."""
    # They tell of every step on the console, and warn of packages that could be installed.
    # Without gradients: with them attention over a learned bias is taken apart in a way that the exporter cannot follow.
    with quiet("torch.onnx", "onnx_ir", "onnxscript"), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        program = torch.onnx.export(
            plain, inputs, dynamo=True, optimize=False, opset_version=OPSET, dynamic_shapes=shapes, verbose=False,
            input_names=input_names, output_names=output_names,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def float_copy(model: nn.Module) -> nn.Module:
    """`inference_copy`, without quantizers."""
    plain = inference_copy(model)
    remove(plain)
    return plain


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, without the Trainer that a LightningModule may hold."""
    trainer = model.__dict__.pop("_trainer", None)
    try:
        copied = copy.deepcopy(model)
    finally:
        if trainer is not None:
            model.__dict__["_trainer"] = trainer
    return copied.eval().cpu()
