"""TensorRT's choices within the QDQ form, and its refusals of weights.

| weight | in the file |
|---|---|
| int1 to int8, sign, bwn, twn, per tensor or per channel | INT8, along the output channels |
| int1 to int4 in groups of 64 or 128, of linear layers with float inputs | INT4 in blocks |

Biases stay float: DequantizeLinear of TensorRT reads no INT32.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.tensorrt.lint import lint
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.layers import weight_shape

#: Elements of a block of INT4 (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
#: quantized-types-schemes.html).
BLOCKS = (64, 128)
#: Formats besides int that are small integers with float scales.
_SMALL = ("sign", "bwn", "twn")


def weight_fault(spec: QuantSpec, layer: Any) -> str | None:
    """Returns why TensorRT reads no such weight of a layer; None: it does."""
    fixed = spec.is_uniform and "granularity" not in spec.kind.choices  # blocks of 32 or 256 and no others
    if fixed or (not spec.is_uniform and spec.format_name not in _SMALL):
        return f"no format of this file but int, {', '.join(_SMALL)}"
    reasons = []
    if not spec.signed or spec.affine:
        reasons.append("weights are signed integers with zero point 0")
    if spec.bit_width > 8:
        reasons.append("weights have at most 8 bits")
    if isinstance(spec.granularity, PerGroup) and (reason := _block_fault(spec, spec.granularity, layer)):
        reasons.append(reason)
    return " and ".join(reasons) or None


def _block_fault(spec: QuantSpec, group: PerGroup, layer: Any) -> str | None:
    shape = weight_shape(layer)
    if spec.bit_width > 4 or group.group_size not in BLOCKS:
        return f"groups are those of at most 4 bits, of {' or '.join(map(str, BLOCKS))} elements"
    if len(shape) != 2 or not issubclass(getattr(type(layer), "float_class", type(layer)), nn.Linear):
        return "groups are those of linear layers"
    if shape[1] % group.group_size or shape[0] % 2:
        return f"groups divide the inputs, and the outputs are even, got {shape[1]} inputs and {shape[0]} outputs"
    return "groups are next to float inputs" if getattr(layer, "input_quantizer", None) is not None else None


TENSORRT = Form(
    smallest=4,
    smallest_whole=8,
    signed=True,
    activation_bits=8,
    channel_activations=False,
    integer_biases=False,
    half=False,
    negative_scales=False,
    float_activations=False,
    weight_fault=weight_fault,
    lint=lint,
)
