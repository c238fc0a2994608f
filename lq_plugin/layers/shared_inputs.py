"""Linear layers in one module that may read one tensor: attention's projections, a gated feed-forward."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.quantizers import SharedInput


def share_inputs(model: nn.Module) -> None:
    """Lets neighbouring linear layers of equally many inputs quantize a tensor once, where their qparams are equal."""
    for module in model.modules():
        # A sequence hands each layer another tensor; scripted modules take no hooks.
        if isinstance(module, (nn.Sequential, torch.jit.ScriptModule)) or _shared(module):
            continue
        groups: dict[int, list[QuantizedLayer]] = defaultdict(list)
        for child in dict.fromkeys(module.children()):
            if isinstance(child, QuantizedLayer) and "input" in type(child).slots and type(child).input_axis == -1:
                groups[type(child).channels(child)[0]].append(child)
        for layers in groups.values():
            if len(layers) > 1:
                shared = SharedInput()
                for layer in layers:
                    layer._shared_input = shared
                module.register_forward_pre_hook(shared.enter)
                module.register_forward_hook(shared.leave, always_call=True)


def unshare_inputs(model: nn.Module) -> None:
    """Takes the hooks of `share_inputs` away; the layers forget with their quantizers (`detach_quantizers`)."""
    for module in model.modules():
        for hooks, key in _shared(module):
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def _shared(module: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The hooks of ours, as the dict that holds each and its key."""
    held = (module._forward_pre_hooks, module._forward_hooks)
    return [
        (hooks, key)
        for hooks in held
        for key, hook in hooks.items()
        if isinstance(getattr(hook, "__self__", None), SharedInput)
    ]
