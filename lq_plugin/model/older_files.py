"""State dicts of earlier versions, which quantized less under the same plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lq_plugin.errors import PlanError, raise_all
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.layers import CompoundWeight, QuantizedLayer, added_slots, leave_out, put_back


def leave_out_newer(model: nn.Module, state: Iterable[str]) -> list[str]:
    """Takes out of a prepared model the quantizers that the version which wrote a state dict did not have.

    Its hidden states of LSTMs were float, say; a state dict of this version has keys for them. What is left out stays
    so when the model is prepared again with the same plan, until `put_back_newer`.

    Args:
        model: prepared, after `put_back_newer`.
        state: keys of the state dict of a quantized model.

    Returns:
        The names of these tensors.

    Raises:
        PlanError: it has ranges for some of these tensors of a module, so that this version wrote it, and none for
            others. The model is unchanged then.
    """
    keys = set(state)
    absent: dict[nn.Module, list[tuple[QuantizedLayer, str]]] = defaultdict(list)
    present = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        module = layer.owner if isinstance(layer, CompoundWeight) else layer
        for slot in added_slots(layer):
            quantizer = getattr(layer, f"{slot}_quantizer")
            if quantizer is None:
                continue
            if any(f"{path}.{slot}_quantizer.{key}" in keys for key in quantizer.state_dict()):
                present.add(module)
            else:
                absent[module].append((layer, slot))
    raise_all(PlanError, "the state dict has only some of the ranges of a module, the plan asks for more", [
        f"{getattr(layer, f'{slot}_quantizer').name}: it has no range"
        for module, tensors in absent.items() if module in present for layer, slot in tensors
    ])  # fmt: skip
    left_out = []
    for layer, slot in (tensor for tensors in absent.values() for tensor in tensors):
        left_out.append(getattr(layer, f"{slot}_quantizer").name)
        leave_out(layer, slot)
    return left_out


def put_back_newer(model: nn.Module) -> None:
    """Undoes `leave_out_newer`, before another file is loaded."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            put_back(layer, layer._left_out)


def why_left_out(layer: nn.Module) -> str | None:
    """Returns the ledger's reason for the tensors of a layer that `leave_out_newer` left float, if there are any."""
    if not isinstance(layer, QuantizedLayer) or not layer._left_out:
        return None
    slots = " and ".join(slot for slot in SLOTS if slot in layer._left_out)
    return f"the file comes from a version without these ranges, of its {slots}"


def without_newer(layer: nn.Module, plan: LayerPlan) -> LayerPlan:
    """The plan of a layer without the tensors that `leave_out_newer` left float."""
    slots = layer._left_out if isinstance(layer, QuantizedLayer) else ()
    if not slots:
        return plan
    kept = {slot: None if slot in slots else getattr(plan, slot) for slot in SLOTS}
    return replace(plan, **kept, stages=tuple(stage for stage in plan.stages if stage.slot not in slots))
