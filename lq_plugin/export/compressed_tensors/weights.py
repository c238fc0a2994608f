"""Tensors of a layer as compressed-tensors stores them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lq_plugin.export.codes import encode
from lq_plugin.export.compressed_tensors.schemes import is_symmetric
from lq_plugin.functional.minifloat import E2M1, E4M3
from lq_plugin.intent.spec import PerBlock, PerGroup, QuantSpec
from lq_plugin.layers import QuantizedLayer
from lq_plugin.quantizers.registry import Parts

#: Neighbours of 1/g, in units in the last place, that may be the stored scale of an NVFP4 tensor.
_NEIGHBOURS = 32


def layer_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Returns the tensors that stand in a folder for the weight and the input's range of a layer, by their names.

    Args:
        layer: calibrated, and without a fault (see `lq_plugin.export.compressed_tensors.schemes`).
    """
    quantizer = cast(Any, layer.weight_quantizer).current
    parts = encode(quantizer, layer.weight.detach().cpu())
    if quantizer.spec.format_name == "nvfp4":
        return _nvfp4(parts)
    if quantizer.spec.format_name == "mxfp4":
        exponents = parts["exponent"].values.squeeze(2).to(torch.uint8)
        return {"weight_packed": _pairs(parts["codes"].values), "weight_scale": exponents}
    inputs = None if layer.input_quantizer is None else cast(Any, layer.input_quantizer).current
    if quantizer.spec.format_name == "fp8":
        return _floats(quantizer.spec, parts) | _input(inputs)
    return _packed(quantizer.spec, parts) if inputs is None else _integers(quantizer.spec, parts) | _input(inputs)


def signed(spec: QuantSpec, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes, scales and zero points on the signed integers of the spec's bits: int8, float32, int8."""
    scale, codes = parts["scale"].values, parts["codes"].values
    if "coarse" in parts:
        scale = (scale + 1) * parts["coarse"].values
    # A zero point is stored as its distance from the lowest level, of which 0 is the place where it is not stored.
    zero = parts["zero_point"].values if "zero_point" in parts else torch.full_like(scale, -spec.grid.quant_min)
    columns = 1 if not isinstance(spec.granularity, PerGroup) else scale.shape[1]
    scale, zero = (value.reshape(-1, columns).expand(len(codes), columns).contiguous() for value in (scale, zero))
    # Signed integers begin at -2^(b - 1); a narrow range begins one level higher.
    offset = spec.grid.quant_min if spec.signed else -(2 ** (spec.bit_width - 1))
    return (codes + offset).to(torch.int8), scale.float(), (zero + offset).to(torch.int8)


def _packed(spec: QuantSpec, parts: Parts) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes, scale, zero = signed(spec, parts)
    tensors = packed(codes, spec.bit_width) | {"weight_scale": scale}
    if not is_symmetric(spec):
        tensors["weight_zero_point"] = pack_to_int32(zero, spec.bit_width, packed_dim=0).contiguous()
    return tensors


def packed(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Returns signed codes `[rows, columns]` of int8 packed into int32, and their shape."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    return {"weight_packed": pack_to_int32(codes.contiguous(), bits), "weight_shape": torch.tensor(codes.shape)}


def _integers(spec: QuantSpec, parts: Parts) -> dict[str, Tensor]:
    codes, scale, _ = signed(spec, parts)
    return {"weight": codes, "weight_scale": scale}


def _floats(spec: QuantSpec, parts: Parts) -> dict[str, Tensor]:
    codes, scale = parts["codes"].values, parts["scale"].values
    # Scales of squares are [rows, 1, columns, 1].
    scale = scale.flatten(1) if isinstance(spec.granularity, PerBlock) else scale.expand(len(codes), 1)
    # Codes are the bits of the elements.
    return {"weight": codes.to(torch.uint8).view(torch.float8_e4m3fn), "weight_scale": scale.float().contiguous()}


def _input(quantizer: Any) -> dict[str, Tensor]:
    """Returns the fixed range of an input; nothing for a float one, or where it is found at run time."""
    if quantizer is None or quantizer.spec.dynamic:
        return {}
    scale, zero = (value.detach().cpu().float() for value in quantizer.qparams())
    tensors = {"input_scale": scale.clone()}
    if not is_symmetric(quantizer.spec):
        tensors["input_zero_point"] = (zero - (0 if quantizer.spec.signed else 128)).to(torch.int8)
    return tensors


def _pairs(codes: Tensor) -> Tensor:
    """Returns 4-bit codes two a byte along the rows, the first one in the lower half."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _nvfp4(parts: Parts) -> dict[str, Tensor]:
    scale = E4M3.values()[parts["scale"].values.squeeze(2).long()]
    return {
        "weight_packed": _pairs(parts["codes"].values),
        "weight_scale": scale.to(torch.float8_e4m3fn),
        "weight_global_scale": _inverse_scale(parts["tensor_scale"].values.cpu(), scale.unique()),
    }


def _inverse_scale(g: Tensor, scales: Tensor) -> Tensor:
    """Returns 1/g, or the neighbour of it with which most weights are those of training in bfloat16.

    They are read as bfloat16(q · (s / G)), and were trained as q · (s · g).

    Args:
        g: scale of the tensor, `[1]`.
        scales: of blocks, each once.
    """
    # Sums of 32-bit patterns of positive floats are steps from one float to the next.
    steps = torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, dtype=torch.int32)
    steps = steps[steps.abs().argsort(stable=True)]  # the nearest of equally good ones
    found = (g.reciprocal().view(torch.int32) + steps).view(torch.float32)
    q = E2M1.values()
    trained = (q * (scales * g)[:, None]).bfloat16()
    read = (q * (scales[:, None] / found)[..., None]).bfloat16()
    wrong = (read != trained[:, None]).sum((0, 2))
    return found[wrong.argmin()].reshape(1)
