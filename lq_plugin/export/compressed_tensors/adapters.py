"""Adapters of PEFT that are not merged: a folder holds the base, and next to it what PEFT itself writes of them.

    folder/            the quantized base, as without adapters: `from_pretrained`, `vllm serve folder`
    folder/adapters/   `PeftModel.from_pretrained(base, ...)`, `--enable-lora --lora-modules name=...`

The adapters are float there, as PEFT keeps them. transformers 5 holds a packed weight until the first forward pass, and
PEFT 0.21 reads the attribute `weight` of what it wraps: the base runs once before PEFT wraps it (`open_adapted`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lq_plugin.model.copies import copy_model
from lq_plugin.model.prepare import quantized_layers

#: Subfolder of the adapters.
FOLDER = "adapters"


def wrapped_parts(model: nn.Module, prefix: str) -> list[str]:
    """Returns the names of PEFT's modules inside of a transformers model, a layer's before those of its adapter.

    Args:
        model: that holds it.
        prefix: its name there, with a dot; empty for the model itself.
    """
    names = [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]
    # PEFT's own model around the transformers model is one.
    return [name for name in names if name.startswith(prefix) and name + "." != prefix]


def adapter_faults(model: nn.Module, prefix: str) -> list[str]:
    """Returns what keeps adapters from being written next to their base.

    Args:
        model: with adapters that are not merged.
        prefix: as in `wrapped_parts`.
    """
    parts = wrapped_parts(model, prefix)
    owner = _owner(model)
    if owner is None:
        return [f"adapters='beside' writes those of a PeftModel ({parts[0]} is in none): make it by get_peft_model"]
    if len(owner.peft_config) > 1:
        listed = ", ".join(owner.peft_config)
        return [f"there are several adapters ({listed}), a folder has one: take the others away by delete_adapter"]
    inside = [
        name
        for name, _ in quantized_layers(model)
        if ".base_layer" not in name and any(name.startswith(f"{part}.") for part in parts)
    ]
    return [
        f"{name} is quantized, and PEFT writes an adapter's own weights as float: leave it float" for name in inside
    ]


def taken_apart(model: nn.Module) -> tuple[nn.Module, Any]:
    """Returns a copy of a model without adapters, and the PeftModel that has them.

    Args:
        model: without `adapter_faults`; it is not changed.
    """
    owner = _owner(model)
    copy: Any = copy_model(cast(Any, owner))
    base: nn.Module = copy.unload()
    return base, owner


def open_adapted(base: Any, folder: Path) -> nn.Module:
    """Returns a base with its adapters, in PEFT's layers.

    Args:
        base: transformers model, loaded; changed.
        folder: that the adapters are in, or a folder of it.
    """
    from peft import PeftModel

    (config,) = folder.rglob("adapter_config.json")
    with torch.no_grad():
        base(**base.dummy_inputs)
    adapted: nn.Module = PeftModel.from_pretrained(base, config.parent).eval().get_base_model()
    return adapted


def _owner(model: nn.Module) -> Any:
    """Returns the PeftModel in a model; None: there is none."""
    from peft import PeftModel

    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)
