"""Layers and operations that no batch has reached: a head of another mode, an expert without tokens.

Their activations have no range, so they stay float as a whole, weights also: their quantizers are off, and not
calibrated. That is in the state dict, and the ledger says it. In training the first batch that reaches one gives it a
range.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.quantizers import ActivationQuantizer, Quantizer, Suspension

#: The reason in the ledger.
REASON = "no batch has reached it"


def quantizers_by_owner(model: nn.Module) -> dict[str, list[Quantizer]]:
    """The quantizers of each layer and operation, those of all stages, by its name."""
    owners = (*quantized_layers(model), *quantized_operations(model))
    return {name: quantizers(owner) for name, owner in owners}


def waiting(group: list[Quantizer]) -> list[Quantizer]:
    """Returns the quantizers that need data for their range, and have had none."""
    return [q for q in group if isinstance(q, ActivationQuantizer) and q.lacks_range]


def reached_any(model: nn.Module) -> bool:
    """Returns whether any quantizer that needs data for its range has had some."""
    return any(
        isinstance(q, ActivationQuantizer) and q.needs_calibration and q.is_calibrated for q in quantizers(model)
    )


def unreached(model: nn.Module) -> dict[str, list[Quantizer]]:
    """The layers and operations that no batch has reached, with their quantizers."""
    groups = quantizers_by_owner(model).items()
    return {name: group for name, group in groups if waiting(group) and not any(q.is_enabled for q in group)}


def without_range(model: nn.Module) -> list[Quantizer]:
    """The quantizers that need a range and have none; those that no batch has reached need none."""
    silent = {id(quantizer) for group in unreached(model).values() for quantizer in group}
    return [q for q in quantizers(model) if q.lacks_range and id(q) not in silent]


def suspend(model: nn.Module) -> Suspension:
    """Lets a model that lacks ranges evaluate float until the suspension ends, or a checkpoint brings the ranges."""
    suspension = Suspension()
    for quantizer in quantizers(model) if without_range(model) else ():
        quantizer.suspension = suspension
    return suspension


def settle(before: Mapping[str, list[Quantizer]], model: nn.Module) -> dict[str, list[Quantizer]]:
    """Makes float what data should have reached and did not; switches on what was so before and has its range now.

    Args:
        before: what `unreached` said before the data came.
        model: prepared, with the ranges that the data gave.

    Returns:
        What `unreached` says now.
    """
    for name, group in quantizers_by_owner(model).items():
        reached = name in before and not waiting(group)
        # What a schedule has switched off has not been missed yet.
        if reached or any(quantizer.is_enabled for quantizer in waiting(group)):
            for quantizer in group:
                quantizer.set_enabled(reached)
    return unreached(model)
