"""Choices that the QDQ form leaves open, made for a runtime. Nothing here imports torch or onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """Types and shapes that a file may hold; the defaults suit ONNX Runtime.

    Args:
        smallest: bits of the smallest integer type of weights: 2, 4 or 8.
        smallest_whole: the same of weights without blocks of scales.
        fp4: of weights in 4-bit floats: "int8", "uint4" (an index into the 16 values) or "float4" (FLOAT4E2M1).
        signed: activations are signed integers with zero point 0. False: unsigned ones, with any zero point.
        activation_bits: of the largest integer type of activations: 8 or 16.
        channel_activations: activations may have a scale for each channel.
        integer_biases: biases next to quantized inputs are int32 (`lq_plugin.export.onnx_file.biases`). False: they
            stay float.
        half: the model may be float16.
        negative_scales: weights may have them, where a batch norm's negative factor moves in.
        dynamic: activations may have a range that is found at run time (DynamicQuantizeLinear).
        float_activations: activations may be FP8 with one fixed scale.
        weight_fault: says why a layer's weight cannot be stored; called with its spec and the layer.
        lint: returns the rules that a finished file breaks; such a file is not written.
    """

    smallest: int = 2
    smallest_whole: int = 2
    fp4: str = "int8"
    signed: bool = False
    activation_bits: int = 16
    channel_activations: bool = True
    integer_biases: bool = True
    half: bool = True
    negative_scales: bool = True
    dynamic: bool = True
    float_activations: bool = True
    weight_fault: Callable[[Any, Any], str | None] | None = None
    lint: Callable[[Any], Sequence[Any]] | None = None
