"""Training with Brevitas: its convolution and linear layers with int weights per channel and affine inputs per tensor.

Attention's projections stay float. `collecting`: its input quantizers while they collect statistics, which is 300 steps
by default; `learned`: after that, when scale and zero point are parameters.
"""

from __future__ import annotations

import brevitas.nn as qnn  # type: ignore[import-not-found]
from brevitas.graph.quantize import layerwise_quantize  # type: ignore[import-not-found]
from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat  # type: ignore[import-not-found]
from torch import nn

#: Statistics are collected in so many steps.
STEPS = {"collecting": 10**6, "learned": 1}


def training(model: nn.Module, setting: str, variant: str) -> nn.Module:
    """The model with quantized layers, in training mode."""
    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": int(setting[1]),
        "input_quant": ShiftedUint8ActPerTensorFloat,
        "input_bit_width": int(setting[3]),
        "input_collect_stats_steps": STEPS[variant],
        "return_quant_tensor": False,
    }
    return layerwise_quantize(
        model, {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    ).train()
