"""What every export refuses before it starts to work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lq_plugin.errors import ExportError
from lq_plugin.export.codes import nothing_stored
from lq_plugin.export.torchao import RowsLinear
from lq_plugin.export.xnor.layers import XNORConv, XNORLinear
from lq_plugin.model.prepare import quantized_layers


def check_folder(path: str | Path) -> None:
    """Refuse a file that cannot be written for want of its folder.

    Raises:
        ExportError: there is none, or a folder stands in the file's place.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder, give the name of a file")


def check_unchanged(model: nn.Module) -> None:
    """Refuse a model whose layers have become kernels: no whole numbers and scales can be read from those.

    Raises:
        ExportError: naming the layers, and what has changed them.
    """
    kernels: dict[str, tuple[type[nn.Module], ...]] = {"use_torchao": (RowsLinear,), "use_xnor": (XNORLinear, XNORConv)}
    for function, kinds in kernels.items():
        changed = [name or "the model itself" for name, module in model.named_modules() if isinstance(module, kinds)]
        if changed:
            listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise ExportError(
                f"{type(model).__name__} was changed by {function} ({listed}), for inference in this process only: "
                "export it before, or load its checkpoint into a new one"
            )


def stored_faults(model: nn.Module) -> list[str]:
    """What of a prepared model's last stage no file can hold whatever its weights will be."""
    specs = {name: layer.layer_plan.weight for name, layer in quantized_layers(model)}
    reasons = {name: nothing_stored(spec) for name, spec in specs.items() if spec is not None}
    return [f"{name}.weight ({specs[name]}): {reason}" for name, reason in reasons.items() if reason is not None]


def check_float32(model: nn.Module) -> None:
    """Refuse a model in another precision: its ranges and rounding are those of that one.

    Raises:
        ExportError: saying which parameters.
    """
    others = {
        name: p.dtype for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32
    }
    if others:
        name, dtype = next(iter(others.items()))
        raise ExportError(
            f"{type(model).__name__} is in {str(dtype).removeprefix('torch.')} ({name}, {len(others)} parameters), an "
            "ONNX file is made "
            "of a float32 one: call model.float(), and verify the file"
        )
