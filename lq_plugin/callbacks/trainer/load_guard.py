"""`MyModule.load_from_checkpoint` of a quantized checkpoint names the remedy, with `strict=False` also.

A module without quantizers would take the weights and leave the ranges, a float model that was trained to be quantized.
Lightning calls nothing of ours there, so its function that fills the new module is wrapped, once in each of its
packages.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from lq_plugin.errors import PlanError
from lq_plugin.model.checkpoint import is_quantized
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.utilities.lightning_packages import PACKAGES


def guard_load_from_checkpoint() -> None:
    """Wraps `load_from_checkpoint` in every package of Lightning that is imported and not wrapped yet."""
    for package in PACKAGES:
        if package in sys.modules:
            saving = import_module(f"{package}.core.saving")
            original = getattr(saving, "_load_state", None)
            if original is not None and not hasattr(original, "guarded"):
                saving._load_state = _guarded(original)  # type: ignore[attr-defined]


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state(cls: type[Any], checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not is_quantized(checkpoint.get("state_dict", {})):
            return original(cls, checkpoint, *args, **kwargs)
        remedy = (
            f"the checkpoint is of a quantized model: lq_plugin.load_checkpoint({cls.__name__}, path) "
            "returns it with its ranges"
        )
        try:
            loaded = original(cls, checkpoint, *args, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n  {remedy}") from error
        if isinstance(loaded, nn.Module) and not quantized_layers(loaded):
            raise PlanError(f"{cls.__name__}.load_from_checkpoint would leave the model float: {remedy}")
        return loaded

    load_state.guarded = True  # type: ignore[attr-defined]
    return load_state
