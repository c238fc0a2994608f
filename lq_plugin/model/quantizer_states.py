"""The quantizers of a model apart from its weights, for checkpoints that leave parts of the model out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lq_plugin.quantizers import SlotQuantizer


def quantizer_states(model: nn.Module) -> dict[str, Tensor]:
    """Returns the quantizers' part of `model.state_dict()`: ranges, learned scales, switches."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SlotQuantizer))
    return {key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefixes)}


def load_missing_states(model: nn.Module, kept: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Gives quantizers their kept state where a checkpoint has not all of it.

    Args:
        model: has loaded the checkpoint.
        kept: from `quantizer_states`, of the same plan and moment.
        loaded: the checkpoint's own state dict.
    """
    for name, module in model.named_modules():
        if isinstance(module, SlotQuantizer):
            state = {key.removeprefix(f"{name}."): tensor for key, tensor in kept.items() if key.startswith(f"{name}.")}
            if any(f"{name}.{key}" not in loaded for key in state):
                module.load_state_dict(state)
