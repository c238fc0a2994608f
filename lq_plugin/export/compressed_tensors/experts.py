"""Weights of experts: a parameter of three dims in a model, a linear layer for each expert in a folder.

Transformers splits such parameters when it saves a model, by `WeightConverter`s of each architecture: `gate_up_proj`
of Mixtral's expert 0 becomes `experts.0.w1` and `experts.0.w3`. Codes and scales of a stack are split the same way:
rows stay rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lq_plugin.export.codes import Part, encode
from lq_plugin.export.compressed_tensors.schemes import is_symmetric
from lq_plugin.export.compressed_tensors.weights import packed, signed
from lq_plugin.intent.spec import PerBlock, PerGroup, PerMatrix, QuantSpec
from lq_plugin.layers.compound.own_weights import OwnWeight, QuantizedOwnWeight
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.unreached import unreached

_END = ".weight"


def is_stack(layer: Any) -> bool:
    """Returns True for the weights of several experts, float or quantized."""
    return isinstance(layer, OwnWeight) and layer.experts is not None


def stacks_of(source: nn.Module) -> dict[str, QuantizedOwnWeight]:
    """Returns the quantized weights of experts that a batch has reached, by their parameters' names."""
    silent = unreached(source)
    return {
        name: cast(QuantizedOwnWeight, layer)
        for name, layer in quantized_layers(source)
        if is_stack(layer) and layer.weight_quantizer is not None and name not in silent
    }


def stack_fault(spec: QuantSpec, stack: OwnWeight) -> str | None:
    """Returns why a folder cannot hold the weights of experts under a spec; None: it can.

    Args:
        spec: of the weights.
        stack: float or quantized.
    """
    if stack.inputs_first:
        return "weights of experts are held as [experts, outputs, inputs], here the inputs are first"
    group = spec.granularity
    if spec.format_name == "fp8":
        plain = spec.format_options in ((), ("e4m3",)) and not isinstance(group, (PerGroup, PerBlock))
        return None if plain else "experts in fp8 are E4M3 with a scale for each channel"
    if spec.format_name != "int" or not 2 <= spec.bit_width <= 8 or not is_symmetric(spec):
        return "experts are symmetric integers of 2 to 8 bits, or fp8"
    columns = stack.weight.shape[-1]
    if isinstance(group, PerGroup) and columns % group.group_size:
        return f"its rows of {columns} are no whole groups of {group.group_size}"
    return None


def split(source: nn.Module, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors `[experts, rows, ...]` as those of single experts, by the names of their layers in a folder.

    Args:
        source: transformers model.
        stacks: by name of the parameter; a name that the architecture does not split is left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found = revert_weight_conversion(cast(Any, source), dict(stacks))
    return {key.removesuffix(_END): value for key, value in found.items() if key.endswith(_END) and value.ndim == 2}


def architecture_fault(source: nn.Module) -> str | None:
    """Returns why transformers has no single experts for a model whose experts are quantized; None: it has."""
    for name, stack in stacks_of(source).items():
        whole = torch.empty(stack.weight.shape, device="meta")
        if sum(map(len, split(source, {name: whole}).values())) != whole.shape[0] * whole.shape[1]:
            return (
                f"{name}: transformers saves the experts of a {type(source).__name__} as they are, not each by itself, "
                "and reads no packed ones: leave them float"
            )
    return None


def expert_tensors(source: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a folder for the quantized weights of experts, by name."""
    codes: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    specs = set()
    for name, stack in stacks_of(source).items():
        quantizer = cast(Any, stack.weight_quantizer).current
        parts = encode(quantizer, stack.canonical(stack.weight.detach()).cpu())
        if isinstance(quantizer.spec.granularity, PerMatrix):  # a channel's scale is that of its expert
            rows = parts["scale"].values.reshape(-1, 1).repeat_interleave(quantizer.spec.granularity.rows, 0)
            parts = parts | {"scale": Part(rows)}
        specs.add((quantizer.spec.format_name, quantizer.spec.bit_width))
        if quantizer.spec.format_name == "fp8":
            values, scale = parts["codes"].values.to(torch.uint8), parts["scale"].values
            scale = scale.reshape(-1, 1)
        else:
            values, scale, _ = signed(quantizer.spec, parts)
        shape = stack.weight.shape[:2]
        codes[name] = values.view(*shape, -1)
        scales[name] = scale.expand(len(values), scale.shape[1]).float().reshape(*shape, -1)
    if not specs:
        return {}
    ((kind, bits),) = specs
    scale_of, tensors = split(source, scales), dict[str, Tensor]()
    for name, value in split(source, codes).items():
        mine = {"weight_scale": scale_of[name].contiguous()}
        mine |= {"weight": value.contiguous().view(torch.float8_e4m3fn)} if kind == "fp8" else packed(value, bits)
        tensors |= {f"{name}.{part}": tensor for part, tensor in mine.items()}
    return tensors
