"""Calibration of Brevitas: its convolution and linear layers with int4 weights per channel and affine uint4 inputs per
tensor.

Attention's projections stay float. Inputs by percentile 99.999, its default; weights by the largest magnitude, which it
takes anew in each forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import brevitas.nn as qnn  # type: ignore[import-not-found]
import torch
from brevitas.graph.calibrate import calibration_mode  # type: ignore[import-not-found]
from brevitas.graph.quantize import layerwise_quantize  # type: ignore[import-not-found]
from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat  # type: ignore[import-not-found]
from torch import Tensor, nn


def calibration(model: nn.Module, batches: list[Tensor]) -> dict[str, Callable[[], None]]:
    """Making the quantized model is not timed."""
    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": 4,
        "input_quant": ShiftedUint8ActPerTensorFloat,
        "input_bit_width": 4,
        "return_quant_tensor": False,
    }
    layers = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    quantized = layerwise_quantize(copy.deepcopy(model), layers).eval()
    return {"brevitas percentile": partial(_run, quantized, batches)}


def _run(model: nn.Module, batches: list[Tensor]) -> None:
    # Statistics go on from where they stand: each run gets fresh ones.
    fresh = copy.deepcopy(model)
    with torch.no_grad(), calibration_mode(fresh):
        for batch in batches:
            fresh(batch)
