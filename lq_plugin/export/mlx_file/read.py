"""Files for MLX read back: a float model whose quantized layers are computed by MLX itself."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.mlx_file.write import config_path, held_model


def mlx() -> Any:
    """Returns the module `mlx.core`, which is not installed everywhere."""
    return import_module("mlx.core")


def load_mlx(model: nn.Module, path: Path) -> None:
    """Fills a float model from a file; its quantized layers call `mlx.core.quantized_matmul` from then on.

    Args:
        model: of the class that was exported, on the CPU.
        path: of the safetensors file, with its `config.json`.

    Raises:
        ExportError: no such file, a damaged one, or one of another model.
    """
    mx = mlx()
    try:
        arrays: dict[str, Any] = mx.load(str(path))
        content = json.loads(config_path(path).read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"cannot read {path} and its config.json: {error}") from error
    prefix, _ = held_model(model)
    settings = {f"{prefix}{layer}": value for layer, value in content.items() if isinstance(value, dict)}
    layers: dict[nn.Parameter, Any] = {}
    modules = dict(model.named_modules())
    unknown = [name for name in settings if not isinstance(modules.get(name), (nn.Linear, nn.Embedding))]
    faults = [f"there is no layer {name!r}" for name in unknown]
    raise_all(ExportError, f"{path} is of another model", faults)
    for name, chosen in settings.items():
        stored = {
            part: arrays.pop(f"{name.removeprefix(prefix)}.{part}", None) for part in ("weight", "scales", "biases")
        }
        layers[model.get_submodule(name).weight] = stored, chosen  # type: ignore[index]
    state = {f"{prefix}{key}": _tensor(value) for key, value in arrays.items()}
    own = model.state_dict(keep_vars=True)
    wanted = {key for key, value in own.items() if value not in layers}
    tied = [key for key in wanted - set(state) if any(own[other] is own[key] for other in state if other in own)]
    faults = [f"the file lacks {key!r}" for key in sorted(wanted - set(state) - set(tied))]
    faults += [f"{key!r} is only in the file" for key in sorted(set(state) - wanted)]
    raise_all(ExportError, f"{path} is of another model", faults)
    model.load_state_dict(state, strict=False)
    for name, module in list(model.named_modules()):
        if name and getattr(module, "weight", None) in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, MLXLayer(module, *layers[module.weight]))


class MLXLayer(nn.Module):
    """Linear layer or embedding computed by MLX.

    Args:
        layer: float; its bias is kept.
        stored: MLX arrays `weight`, `scales` and maybe `biases`.
        settings: `group_size`, `bits` and `mode`.
    """

    def __init__(self, layer: nn.Module, stored: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.stored, self.settings = stored, settings
        self.is_embedding = isinstance(layer, nn.Embedding)
        self.bias = getattr(layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the float layer's shape."""
        mx = mlx()
        weight, scales, biases = (self.stored[part] for part in ("weight", "scales", "biases"))
        given = mx.array(x.detach().numpy())
        if self.is_embedding:
            rows = [None if part is None else part[given] for part in (weight, scales, biases)]
            return _tensor(mx.dequantize(*rows, **self.settings, dtype=mx.float32))
        y = _tensor(mx.quantized_matmul(given, weight, scales, biases, transpose=True, **self.settings))
        return y if self.bias is None else y + self.bias


def _tensor(array: Any) -> Tensor:
    mx = mlx()
    plain = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
    return torch.from_numpy(np.array(plain))
