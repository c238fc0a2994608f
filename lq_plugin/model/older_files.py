"""State dicts of earlier versions, which quantized less under the same plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.layers import QuantizedLayer, added_slots


def leave_out_newer(model: nn.Module, state: Iterable[str]) -> list[str]:
    """Take out of a prepared model the quantizers that the version which wrote a state dict did not have.

    Its hidden states of LSTMs were float, say; a state dict of this version has keys for them. What is left out stays
    so when the model is prepared again with the same plan.

    Args:
        model: prepared.
        state: keys of the state dict of a quantized model.

    Returns:
        The names of these tensors.
    """
    keys = set(state)
    left_out = []
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        for slot in added_slots(layer):
            quantizer = getattr(layer, f"{slot}_quantizer")
            if quantizer is not None and not any(
                f"{path}.{slot}_quantizer.{key}" in keys for key in quantizer.state_dict()
            ):
                setattr(layer, f"{slot}_quantizer", None)
                layer._left_out = (*layer._left_out, slot)
                left_out.append(quantizer.name)
    return left_out


def without_newer(layer: nn.Module, plan: LayerPlan) -> LayerPlan:
    """The plan of a layer without the tensors that `leave_out_newer` left float."""
    slots = layer._left_out if isinstance(layer, QuantizedLayer) else ()
    if not slots:
        return plan
    kept = {slot: None if slot in slots else getattr(plan, slot) for slot in SLOTS}
    return replace(plan, **kept, stages=tuple(stage for stage in plan.stages if stage.slot not in slots))
