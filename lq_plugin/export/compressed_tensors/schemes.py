"""What compressed-tensors holds of a plan: each layer's specs as one of its schemes, or the reason why it has none.

| weight | input | format | in the file |
|---|---|---|---|
| int2..int8, channels or groups | float | pack-quantized | codes packed into int32, float scales |
| the same, affine or unsigned | float | pack-quantized | packed zero points also |
| int2..int8, channels | int8, uint8 | int-quantized | int8 codes, float scales, the input's scale and zero point |
| nvfp4 | float | nvfp4-pack-quantized | two codes a byte, E4M3 scales, the inverse of the tensor's scale |
| mxfp4 | float | mxfp4-pack-quantized | two codes a byte, exponents |

Source: `QuantizationArgs` and the compressors of compressed-tensors 0.20.1; vLLM's
`quantization/compressed_tensors/compressed_tensors.py` for what it has kernels for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lq_plugin.intent.spec import PerGroup, PerTensor, QuantSpec

#: Fields of `QuantizationArgs` for the formats whose scales belong to them.
_BLOCKS: dict[str, dict[str, Any]] = {
    "nvfp4": {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}


def is_symmetric(spec: QuantSpec) -> bool:
    """Returns True where the levels of an integer spec need no zero point as signed integers."""
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
        fields = {"num_bits": 4, "type": "float", **_BLOCKS[weight.format_name]}
        return {"format": f"{weight.format_name}-pack-quantized", "weights": fields}
    fields = {"num_bits": weight.bit_width, "type": "int", "symmetric": is_symmetric(weight), "strategy": "channel"}
    if isinstance(weight.granularity, PerGroup):
        fields |= {"strategy": "group", "group_size": weight.granularity.group_size}
    if inputs is None:
        return {"format": "pack-quantized", "weights": fields}
    # Codes of fewer bits are codes of 8 bits also, and for these there are kernels.
    activations = {"num_bits": 8, "type": "int", "symmetric": is_symmetric(inputs), "strategy": "tensor"}
    return {"format": "int-quantized", "weights": fields | {"num_bits": 8}, "input_activations": activations}


def weight_fault(spec: QuantSpec, layer: Any) -> str | None:
    """Returns why a folder cannot hold a weight under a spec; None: it can.

    Args:
        spec: of the weight.
        layer: float or quantized.
    """
    if isinstance(layer, nn.Embedding):
        return "transformers cannot load packed embeddings"
    if not isinstance(layer, nn.Linear):
        return f"weights of linear layers are held, not those of a {_kind(layer)}"
    columns = layer.in_features
    if spec.format_name in _BLOCKS:
        size = _BLOCKS[spec.format_name]["group_size"]
        if columns % size:
            return f"its rows of {columns} are no whole blocks of {size}"
        return None if _input_spec(layer) is None else f"{spec.format_name} is for weights next to float inputs"
    if spec.format_name != "int":
        return "a folder holds integers, nvfp4 and mxfp4"
    if not 2 <= spec.bit_width <= 8:
        return "integers have 2 to 8 bits"
    return _granularity_fault(spec, layer, columns)


def _granularity_fault(spec: QuantSpec, layer: Any, columns: int) -> str | None:
    group, inputs = spec.granularity, _input_spec(layer)
    if isinstance(group, PerGroup) and columns % group.group_size:
        return f"its rows of {columns} are no whole groups of {group.group_size}"
    if inputs is not None and isinstance(group, PerGroup):
        return "groups are for weights next to float inputs"
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
    if spec.format_name != "int" or spec.bit_width != 8 or spec.narrow_range:
        return "inputs are integers of 8 bits on their whole range"
    return None if isinstance(spec.granularity, PerTensor) else "an input has one scale"


def _input_spec(layer: Any) -> QuantSpec | None:
    quantizer = getattr(layer, "input_quantizer", None)
    return None if quantizer is None else quantizer.spec


def _kind(layer: Any) -> str:
    return getattr(type(layer), "float_class", type(layer)).__name__
