"""Fused evaluation paths of torch that read weights past the layers that own them.

In evaluation, `nn.TransformerEncoderLayer` calls one fused kernel with the weights of `linear1` and `linear2`, and
`nn.TransformerEncoder` hands it nested tensors: quantizers in these layers would silently not run. Both
have a switch of their own, which is set while the model is quantized.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.operations.quantized import OperationQuantizers

#: The attribute that must have this value for the ordinary path.
_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_SAVED = "_lq_fast_path"


def disable_fast_paths(model: nn.Module) -> None:
    """Takes the ordinary path in every module that holds quantized layers or operations."""
    for module in model.modules():
        for kind, (name, value) in _SWITCHES.items():
            if isinstance(module, kind) and _SAVED not in module.__dict__ and _holds_quantizers(module):
                module.__dict__[_SAVED] = getattr(module, name)
                setattr(module, name, value)


def restore_fast_paths(model: nn.Module) -> None:
    """Undoes `disable_fast_paths`."""
    for module in model.modules():
        for kind, (name, _) in _SWITCHES.items():
            if isinstance(module, kind) and _SAVED in module.__dict__:
                setattr(module, name, module.__dict__.pop(_SAVED))


def _holds_quantizers(module: nn.Module) -> bool:
    return any(isinstance(inner, (QuantizedLayer, OperationQuantizers)) for inner in module.modules())
