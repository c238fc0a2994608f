"""File for MLX of a prepared model, and the `config.json` next to it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lq_plugin.errors import ExportError
from lq_plugin.export.codes import quantizer_in_force
from lq_plugin.export.mlx_file.words import Words, stored
from lq_plugin.utilities.files import replacing, write_file


def write_mlx(model: nn.Module, path: Path) -> int:
    """Writes a model as safetensors, and its `config.json`; returns the bytes of both.

    Names are those of the state dict, of the transformers model where a module holds nothing else. Weights of quantized
    layers are words, scales and biases; everything else is as it is.

    Args:
        model: prepared and calibrated; its faults have been asked for.
        path: of the safetensors file; mlx-lm finds it where it is called `model*.safetensors`.

    Raises:
        ExportError: no place to write.
    """
    prefix, config = held_model(model)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    done: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if "_quantizer." in f".{key}" or done.setdefault(id(value), name) != name:
            continue
        owner, _, slot = key.rpartition(".")
        quantizer = quantizer_in_force(model.get_submodule(owner)) if slot == "weight" else None
        if quantizer is None:
            tensors[name] = value.detach().cpu().contiguous()
            continue
        words: Words = stored(quantizer, value)
        layer = name.removesuffix(".weight")
        settings[layer] = words.settings()
        tensors |= {f"{layer}.{part}": torch.from_numpy(array) for part, array in words.arrays.items()}
    content = {**config, "quantization": {**_most_common(settings), **settings}}
    with replacing(path, ExportError) as stream:
        stream.write(save(tensors, {"format": "mlx"}))
    write_file(config_path(path), json.dumps(content, indent=2) + "\n", ExportError)
    return path.stat().st_size + config_path(path).stat().st_size


def config_path(path: Path) -> Path:
    """Returns the path of the config that belongs to a file."""
    return path.with_name("config.json")


def held_model(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Returns the prefix and the config of the transformers model that holds all parameters; else `""` and none."""
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "model_type") and hasattr(config, "to_dict"):
            prefix = f"{name}." if name else ""
            if all(key.startswith(prefix) or "_quantizer." in key for key in model.state_dict()):
                return prefix, json.loads(json.dumps(config.to_dict(), default=str))
    return "", {}


def folder_faults(path: Path | None) -> list[str]:
    """Returns why the config cannot be written: there is one already, which this target has not written."""
    if path is None or not config_path(path).is_file():
        return []
    try:
        ours = "quantization" in json.loads(config_path(path).read_text(encoding="utf-8"))
    except ValueError:
        ours = False
    return [] if ours else [f"{config_path(path)} is of another model: give a folder without one"]


def tied_faults(model: nn.Module) -> list[str]:
    """Returns which layers share a weight and quantize it differently: a file has it once."""
    seen: dict[int, tuple[str, str]] = {}
    faults = []
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        quantizer = quantizer_in_force(module)
        spec = "float" if quantizer is None else str(quantizer.spec)
        first, before = seen.setdefault(id(module.weight), (name, spec))
        if before != spec:
            faults.append(
                f"{name}.weight ({spec}) is that of {first} ({before}), and MLX holds it once: give both one spec"
            )
    return faults


def _most_common(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the settings of most layers: those of the file, which others override by name."""
    ((most, _),) = Counter(json.dumps(each) for each in settings.values()).most_common(1)
    found: dict[str, Any] = json.loads(most)
    return found
