"""The transformers model inside a module, and what keeps a folder from holding it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from lq_plugin.errors import ExportError
from lq_plugin.export.compressed_tensors.adapters import adapter_faults, wrapped_parts
from lq_plugin.export.compressed_tensors.experts import architecture_fault, stacks_of
from lq_plugin.export.compressed_tensors.schemes import is_symmetric, scheme_of
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.model.prepare import quantized_layers


def put_source(model: nn.Module, source: nn.Module) -> nn.Module:
    """Returns a float module with another transformers model in place of its own.

    Args:
        model: holds one, of the same class.
        source: the other one.

    Raises:
        ExportError: it holds none of this class, or more than one.
    """
    places = [name for name, part in _outermost(model) if type(part) is type(source)]
    if len(places) != 1:
        raise ExportError(
            f"fresh makes a {type(model).__name__} with {len(places)} models of the class {type(source).__name__}, "
            "which the folder holds: one is wanted"
        )
    if places == [""]:
        return source
    parent, _, name = places[0].rpartition(".")
    setattr(model.get_submodule(parent), name, source)
    return model.eval()


def source_of(model: nn.Module) -> tuple[str, Any]:
    """Returns the one quantized transformers model in a module (or the module itself) and its name there.

    Raises:
        ExportError: there is none, or more than one.
    """
    found = list(_outermost(model))
    quantized = [(name, part) for name, part in found if quantized_layers(part)]
    if len(quantized) == 1:
        return quantized[0]
    kind = type(model).__name__
    if not found:
        raise ExportError(f"{kind} holds no transformers model (a PreTrainedModel), and a folder is one of these")
    listed = ", ".join(f"{name or 'itself'} ({type(part).__name__})" for name, part in quantized or found)
    what = "quantized transformers models" if quantized else "transformers models, none of them quantized"
    raise ExportError(f"{kind} holds {len(quantized or found)} {what}: {listed}; a folder is one: export it alone")


def source_faults(model: nn.Module, adapters: str = "merged") -> list[str]:
    """Returns what keeps a folder from holding a prepared model, its specs aside.

    Args:
        model: that holds a transformers model.
        adapters: the target's option.
    """
    try:
        name, source = source_of(model)
    except ExportError as error:
        return [str(error)]
    prefix = f"{name}." if name else ""
    outside = [layer for layer, _ in quantized_layers(model) if not layer.startswith(prefix)]
    faults = [
        f"{layer} is quantized and no part of {name} ({type(source).__name__}): leave it float" for layer in outside
    ]
    parts = wrapped_parts(model, prefix)
    if parts and adapters == "beside":
        faults += adapter_faults(model, prefix)
    elif parts:
        faults.append(
            f"adapters of PEFT are not merged ({', '.join(parts[:3])}, {len(parts)} in all): call merge_and_unload(), "
            "and export what it returns; or adapters='beside' writes them next to the base, float as they are"
        )
    elif adapters == "beside":
        faults.append(f"adapters='beside', and {type(model).__name__} has no adapters of PEFT")
    return faults


def must_be_dequantized(source: nn.Module) -> bool:
    """Returns True where transformers can read the weights at loading only.

    It keeps a place of another shape for packed zero points, and 4-bit floats that wait for the first forward pass
    become bfloat16 there.
    """
    specs = _weight_specs(source)
    blocks = any(spec.format_name in ("nvfp4", "mxfp4") for spec in specs)
    affine = any(spec.format_name == "int" and not is_symmetric(spec) for spec in specs)
    return affine or (blocks and cast(Any, source).dtype != torch.bfloat16)


def experts_of(source: nn.Module) -> list[str]:
    """Returns the parameters that hold the weights of several experts, which a folder holds as float."""
    return [name for name, weight in source.named_parameters() if weight.ndim == 3]


def decompression_faults(model: nn.Module) -> list[str]:
    """Returns what transformers could not read of a model without other faults."""
    _, source = source_of(model)
    schemes: dict[str, str] = {}
    stacks = stacks_of(source)
    experts = [name for name in experts_of(source) if name not in stacks]
    if stacks and experts:
        return [f"experts are all quantized or all float, here {experts[0]} is float and {next(iter(stacks))} is not"]
    if (fault := architecture_fault(source)) is not None:
        return [fault]
    specs = [cast(Any, stack.weight_quantizer).spec for stack in stacks.values()]
    if len({str(scheme_of(spec, None)) for spec in specs}) > 1:
        return [f"experts have one spec in a folder, got {', '.join(sorted(map(str, set(specs))))}"]
    if experts and any(spec.format_name != "fp8" for spec in _weight_specs(source)):
        return [
            f"transformers takes the weights of all experts for packed ones, and they stay float ({experts[0]}, "
            f"{len(experts)} in all): give the other layers fp8 weights, or leave the model to another target"
        ]
    for name, layer in quantized_layers(source):
        weight, inputs = cast(Any, layer.weight_quantizer), cast(Any, layer.input_quantizer)
        if weight is not None and name not in stacks:
            scheme = scheme_of(weight.spec, None if inputs is None else inputs.spec)
            schemes.setdefault(str(scheme), f"{name} ({weight.spec})")
    if len(schemes) < 2 or not must_be_dequantized(source):
        return []
    return [
        "transformers reads asymmetric weights, and nvfp4 and mxfp4 of a model that is not in bfloat16, where all "
        f"layers have one scheme; here are {', '.join(schemes.values())}: give them one spec, symmetric weights, or "
        "call model.bfloat16()"
    ]


def _weight_specs(source: nn.Module) -> list[QuantSpec]:
    weights = [layer.weight_quantizer for _, layer in quantized_layers(source)]
    return [quantizer.spec for quantizer in weights if quantizer is not None]


def _outermost(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields transformers models that are not part of another one, each once."""
    from transformers import PreTrainedModel

    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, PreTrainedModel):
            yield name, module
            return
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(module, "")
