"""Models of `benchmarks.deploy`: batch norm folding, export of float models."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lq_plugin.model.graph.record import record
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm


def folded(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy whose batch norms are folded into the layers before them."""
    result = copy.deepcopy(model)
    pairs, _ = find_batch_norm_pairs(result, record(result, lambda: result(example)))
    fold_batch_norm(result, pairs)
    return result


def export_float(model: nn.Module, example: Tensor, path: Path) -> None:
    """The float model as ONNX, its input named `x`, its batch of any size."""
    for name in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(), (example,), dynamo=True, opset_version=21, dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
            input_names=["x"],
        )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=False)
