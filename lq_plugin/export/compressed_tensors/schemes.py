"""Schemes of compressed-tensors for the specs of layers, or the reason why it has none.

| weight | input | format | in the file |
|---|---|---|---|
| int2..int8, channels or groups | float | pack-quantized | codes packed into int32, float scales |
| the same, affine or unsigned | float | pack-quantized | packed zero points also |
| int2..int8, channels | int8, uint8 | int-quantized | int8 codes, float scales, the input's scale and zero point |
| int2..int8, channels or groups | int8, a scale for each token | int-quantized | int8 codes, float scales |
| fp8, channels | float, fp8, fp8 for each token | float-quantized | E4M3 codes, float scales, the input's if fixed |
| fp8, squares | float, fp8 for each group | float-quantized | E4M3 codes, float scales of squares |
| nvfp4 | float | nvfp4-pack-quantized | two codes a byte, E4M3 scales, the inverse of the tensor's scale |
| mxfp4 | float | mxfp4-pack-quantized | two codes a byte, exponents |

Source: `QuantizationArgs` and the compressors of compressed-tensors 0.20.1; vLLM's
`quantization/compressed_tensors/compressed_tensors.py` for what it has kernels for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lq_plugin.intent.spec import PerBlock, PerGroup, PerTensor, PerToken, QuantSpec

#: Fields of `QuantizationArgs` for the formats whose scales belong to them.
_BLOCKS: dict[str, dict[str, Any]] = {
    "nvfp4": {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}


def is_symmetric(spec: QuantSpec) -> bool:
    """Returns True where the levels of a spec need no zero point as signed numbers."""
    return spec.signed and not spec.affine


def scheme_of(weight: QuantSpec, inputs: QuantSpec | None) -> dict[str, Any]:
    """Returns the fields of `QuantizationScheme`, but for the names of the layers.

    Args:
        weight: spec without a `weight_fault`.
        inputs: spec without an `input_fault`; None: float.

    >>> scheme_of(QuantSpec.parse("int4 group32"), None)["weights"]
    {'num_bits': 4, 'type': 'int', 'symmetric': True, 'strategy': 'group', 'group_size': 32}
    """
    if weight.format_name in _BLOCKS:
        blocks = {"num_bits": 4, "type": "float", **_BLOCKS[weight.format_name]}
        return {"format": f"{weight.format_name}-pack-quantized", "weights": blocks}
    # A scale of the whole weight is written for each channel.
    fields = _arguments(weight) | _strategy(weight, "channel")
    if inputs is None:
        return {"format": "float-quantized" if weight.format_name == "fp8" else "pack-quantized", "weights": fields}
    if weight.format_name == "int" and not isinstance(weight.granularity, PerGroup):
        # Codes of fewer bits are codes of 8 bits also, and for these there are kernels.
        fields["num_bits"] = 8
    activations = _arguments(inputs) | _strategy(inputs, "tensor") | {"dynamic": inputs.dynamic}
    kind = "float" if inputs.format_name == "fp8" else "int"
    return {"format": f"{kind}-quantized", "weights": fields, "input_activations": activations}


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    kind = "float" if spec.format_name == "fp8" else "int"
    return {"num_bits": spec.bit_width, "type": kind, "symmetric": is_symmetric(spec)}


def _strategy(spec: QuantSpec, whole: str) -> dict[str, Any]:
    group = spec.granularity
    if isinstance(group, PerGroup):
        return {"strategy": "group", "group_size": group.group_size}
    if isinstance(group, PerBlock):
        return {"strategy": "block", "block_structure": [group.size, group.size]}
    if isinstance(group, PerToken):
        return {"strategy": "token"}
    return {"strategy": whole}


def weight_fault(spec: QuantSpec, layer: Any) -> str | None:
    """Returns why a folder cannot hold a weight under a spec; None: it can.

    Args:
        spec: of the weight.
        layer: float or quantized.
    """
    if isinstance(layer, nn.Embedding):
        return "transformers cannot load packed embeddings"
    if not isinstance(layer, nn.Linear):
        return f"weights of linear layers and of experts are held, not those of a {_kind(layer)}"
    quantizer = getattr(layer, "input_quantizer", None)
    inputs: QuantSpec | None = None if quantizer is None else quantizer.spec
    if spec.format_name in _BLOCKS:
        size = _BLOCKS[spec.format_name]["group_size"]
        if layer.in_features % size:
            return f"its rows of {layer.in_features} are no whole blocks of {size}"
        return None if inputs is None else f"{spec.format_name} is for weights next to float inputs"
    if spec.format_name == "fp8":
        return _float_fault(spec, layer, inputs)
    if spec.format_name != "int":
        return "a folder holds integers, fp8, nvfp4 and mxfp4"
    return _integer_fault(spec, layer, inputs)


def _float_fault(spec: QuantSpec, layer: nn.Linear, inputs: QuantSpec | None) -> str | None:
    if spec.format_options not in ((), ("e4m3",)):
        return "a folder holds E4M3"
    group = spec.granularity
    if isinstance(group, PerGroup):
        return "scales of fp8 are those of channels, of squares or of the tensor"
    if isinstance(group, PerBlock) and (layer.in_features % group.size or layer.out_features % group.size):
        return f"its {layer.out_features} rows of {layer.in_features} are no whole squares of {group.size}"
    if inputs is None:
        return None
    if inputs.format_name != "fp8":
        return "fp8 is for weights next to float or fp8 inputs"
    if isinstance(group, PerBlock) != isinstance(inputs.granularity, PerGroup):
        return "squares of a weight belong to groups of its input"
    return None


def _integer_fault(spec: QuantSpec, layer: nn.Linear, inputs: QuantSpec | None) -> str | None:
    if not 2 <= spec.bit_width <= 8:
        return "integers have 2 to 8 bits"
    group, columns = spec.granularity, layer.in_features
    if isinstance(group, PerGroup) and columns % group.group_size:
        return f"its rows of {columns} are no whole groups of {group.group_size}"
    if inputs is not None and inputs.format_name != "int":
        return "integers are for weights next to float or integer inputs"
    if inputs is not None and isinstance(group, PerGroup) and not inputs.dynamic:
        return "groups are for weights next to float inputs, or inputs with a scale for each token"
    if inputs is not None and not is_symmetric(spec):
        return "next to a quantized input, a weight is symmetric"
    several = isinstance(group, PerGroup) and group.group_size < columns
    if several and spec.bit_width == 4 and not is_symmetric(spec) and layer.out_features <= 8:
        return f"compressed-tensors cannot read 4-bit zero points of {layer.out_features} outputs, 8 or fewer"
    return None


def input_fault(spec: QuantSpec, layer: Any) -> str | None:
    """Returns why a folder cannot hold an input under a spec; None: it can.

    Args:
        spec: of the input.
        layer: float or quantized, or an operation.
    """
    if not isinstance(layer, nn.Linear):
        return f"inputs of linear layers are held, not those of a {_kind(layer)}"
    if hasattr(layer, "weight_quantizer") and layer.weight_quantizer is None:
        return "an input is held next to a quantized weight, this one is float"
    group = spec.granularity
    if spec.format_name == "fp8":
        if spec.format_options not in ((), ("e4m3",)):
            return "a folder holds E4M3"
        if isinstance(group, PerGroup):
            whole = spec.dynamic and layer.in_features % group.group_size == 0
            return None if whole else "groups of an input are whole ones, with scales found at run time"
        return None if isinstance(group, (PerTensor, PerToken)) else "an input has one scale, or one for each token"
    if spec.format_name != "int" or spec.bit_width != 8:
        return "inputs are integers of 8 bits, or fp8"
    if not spec.dynamic and spec.narrow_range:
        return "inputs with a fixed scale have all levels"
    if not isinstance(group, PerToken if spec.dynamic else PerTensor):
        return "an input has one fixed scale, or one for each token that is found at run time"
    if spec.dynamic and not (spec.affine or spec.narrow_range):
        return "a token's scale is max|x| / 127, that of a narrow range"
    return None


def _kind(layer: Any) -> str:
    owner = getattr(layer, "owner", layer)  # of an expert's weight, the module that has it
    return getattr(type(owner), "float_class", type(owner)).__name__
