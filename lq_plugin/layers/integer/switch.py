"""The integer forward pass switched on and off for the layers of a model, and its choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from lq_plugin.layers.base import QuantizedLayer
from lq_plugin.layers.compound.base import CONTAINER
from lq_plugin.layers.integer.forward import why_never
from lq_plugin.layers.integer.state import IntegerForward


def enable_integer_forward(
    model: nn.Module,
    choices: Mapping[str, bool] | bool | None = None,
    agree: Callable[[dict[str, str | None]], dict[str, str | None]] | None = None,
) -> None:
    """Lets the quantized layers of `model` compute their training forward pass with integers, where they can.

    Args:
        model: prepared.
        choices: by layer name, as `integer_choices` gave them; True or False for all; a layer without one is tried.
        agree: makes one answer of those of all ranks to why a layer never can (None: it can).
    """
    layers = {_plain(name): module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    reasons = {name: why_never(layer) for name, layer in layers.items()}
    if agree is not None:
        reasons = agree(reasons)
    for name, layer in layers.items():
        layer._integer_state = IntegerForward(
            choices.get(name) if isinstance(choices, Mapping) else choices, reasons[name]
        )


def disable_integer_forward(model: nn.Module) -> None:
    """Goes back to fake quantization everywhere."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module._integer_state = None


def settle_integer_forward(
    model: nn.Module, agree: Callable[[dict[str, bool]], dict[str, bool]] | None = None
) -> list[str]:
    """Chooses for each layer that was tried since.

    Args:
        model: with the integer forward enabled.
        agree: makes one choice of those of all ranks; called while a layer has none, on every rank alike.

    Returns:
        Names of the layers that have a choice now and had none before.
    """
    waiting = {name: state for name, state in _states(model).items() if state.reason is None and state.chosen is None}
    if not waiting:
        return []
    choices = {name: state.ratio < state.worth for name, state in waiting.items() if state.ratio is not None}
    if agree is not None:
        choices = agree(choices)
    for name, chosen in choices.items():
        waiting[name].chosen = chosen
    return list(choices)


def integer_choices(model: nn.Module) -> dict[str, bool]:
    """The choices made, by layer name; for a checkpoint."""
    return {
        name: state.chosen
        for name, state in _states(model).items()
        if state.reason is None and state.chosen is not None
    }


def integer_report(model: nn.Module) -> dict[str, str]:
    """Returns, by layer name, in words how each layer computes its training forward pass, and why."""
    return {name: state.describe() for name, state in _states(model).items()}


def _states(model: nn.Module) -> dict[str, IntegerForward]:
    found = {
        _plain(name): module._integer_state
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    return {name: state for name, state in found.items() if state is not None}


def _plain(name: str) -> str:
    return name.replace(f"{CONTAINER}.", "")
