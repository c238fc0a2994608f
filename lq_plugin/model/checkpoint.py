"""Load checkpoints, float or quantized, into a model. No code in a file is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lq_plugin.errors import PlanError
from lq_plugin.model.ledger import Ledger
from lq_plugin.model.prepare import prepare, quantizers
from lq_plugin.plan import QuantPlan


def load_float_weights(model: nn.Module, path: str | Path) -> None:
    """Load a Lightning checkpoint or a `.safetensors` state dict into a float `model`, strictly.

    Raises:
        FileNotFoundError, RuntimeError: when there is no such file, or its keys or shapes are not the model's.
    """
    path = Path(path)
    content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(content.get("state_dict", content))


def load_checkpoint(model: nn.Module, path: str | Path, plan: QuantPlan | str | Mapping[str, Any] | None = None) -> Ledger:
    """Prepare a float `model` with a checkpoint's plan and load its weights and ranges, strictly.

    Args:
        model: of the class that was trained, on any device.
        path: written by a Trainer with `QAT` or `PTQ`, or by `torch.save(model.state_dict(), path)`.
            No code in it is executed.
        plan: needed where the file holds none (weights-only checkpoints, bare state dicts).

    Returns:
        The ledger; the model computes what it did when it was saved, bit for bit.

    Raises:
        PlanError: there is no plan, or the checkpoint is of a float model.
        RuntimeError: its keys or shapes are not the model's.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content)
    if plan is None:
        saved = [entry["plan"] for entry in content.get("callbacks", {}).values() if isinstance(entry, dict) and "plan" in entry]
        if not saved:
            raise PlanError(
                f"{path} holds no plan: it was saved with weights only, or without QAT and PTQ; give load_checkpoint(..., plan=...)"
            )
        plan = QuantPlan.from_dict(saved[0])
    if not any(key.endswith("_quantizer.calibrated") for key in state):
        raise PlanError(f"{path} is a float checkpoint: load it with model.load_state_dict, then calibrate or train quantized")
    ledger = prepare(model, plan)
    model.load_state_dict(state)
    missing = [quantizer.name for quantizer in quantizers(model) if quantizer.needs_calibration and not quantizer.is_calibrated]
    if missing:
        raise PlanError(f"{path} has no ranges for {', '.join(missing[:5])}: it was written before they were calibrated")
    return ledger
