"""Put quantizers into a model, in place, and take them out again.

Layers are swapped by class: modules, parameters, hooks and the key `weight` keep their identity; a
layer gains the submodules `weight_quantizer`, `input_quantizer` and `output_quantizer`. A module with several weights
(LSTM, attention) has a layer for each, see `lq_plugin.layers.compound.base`. Operations that no layer owns are
quantized where a rule asks for them by name, see `lq_plugin.model.operations.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.nn.parameter import is_lazy

from lq_plugin.errors import ExportError, PlanError, did_you_mean, raise_all
from lq_plugin.intent.plan import LayerInfo, LayerPlan, QuantPlan
from lq_plugin.layers import (
    CONTAINER,
    CompoundWeight,
    QuantizedCompound,
    QuantizedLayer,
    attach_quantizers,
    detach_quantizers,
    names_taken,
    quantized_class,
    share_inputs,
    swapped_compound,
    unshare_inputs,
    weight_is_computed,
    weight_of,
    weight_sources,
)
from lq_plugin.model.aside import quantizing
from lq_plugin.model.fast_paths import disable_fast_paths, restore_fast_paths
from lq_plugin.model.graph.recording import Recording
from lq_plugin.model.ledger import Entry, Ledger
from lq_plugin.model.older_files import why_left_out, without_newer
from lq_plugin.model.operations.quantized import (
    Operation,
    attach_operations,
    detach_operations,
    inner_operations,
    operations_of,
    quantized_operations,
)
from lq_plugin.model.operations.rules import blocked, resolve_operations, split
from lq_plugin.model.survey import OPAQUE, Survey, input_owner
from lq_plugin.quantizers import Quantizer, make_weight_quantizer


def prepare(
    model: nn.Module,
    plan: QuantPlan | str | Path | Mapping[str, Any],
    recording: Recording | Mapping[str, Operation] | None = None,
) -> Ledger:
    """Swaps the layers of `model` that the plan names to quantized ones, in place.

    Preparing a model a second time with the same plan changes nothing.

    Args:
        model: any module; its own code stays untouched.
        plan: a `QuantPlan` or anything `QuantPlan.parse` reads.
        recording: of one forward pass of the float model (`lq_plugin.model.graph.record`), for a plan that names
            operations (`block.add_0`, `*.matmul_*`); or all operations by name. Those inside of an LSTM or an attention
            need none.

    Returns:
        The ledger of what is quantized and what stays float, and why.

    Raises:
        PlanError: when a pattern matches nothing, a layer cannot take its spec, nothing would be quantized,
            or the model is prepared with another plan already. The model is unchanged then.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ledger = prepare(net, "w4a8")
    >>> type(net[0]).__name__, isinstance(net[0], nn.Linear), ledger.summary()
    ('QuantizedLinear', True, '2 quantized, 0 float; coverage 100.0% of weights')
    """
    plan = QuantPlan.parse(plan)
    survey = Survey.of(model, quantizing(plan))
    layers = survey.infos()
    for_layers, operation_rules = split(plan, layers, survey.aside)
    if not layers and for_layers is not None:
        found = [(name, survey.kinds[name], reason) for name, reason in survey.reasons.items()]
        raise _nothing_to_quantize(model, found, ", the plan matches no layer")
    layer_plans = resolve_layers(for_layers, survey, layers)
    layer_plans = {name: without_newer(survey.candidates[name], layer_plan) for name, layer_plan in layer_plans.items()}
    inside = inner_operations(model)
    known = operations_of(recording) | inside if isinstance(recording, Recording) else recording
    prepared = {name: operation.operation for name, operation in quantized_operations(model)}
    operations = prepared | inside if known is None else known
    operation_plans = resolve_operations(operation_rules, operations, plan, known is not None or bool(prepared))
    modules = {name for name, _ in model.named_modules()}
    raise_all(PlanError, "operations of another model", [
        f"{name}: there is no module {operation.place[0]!r}.{did_you_mean(operation.place[0], modules)}"
        for name, (operation, _) in operation_plans.items() if operation.place[0] not in modules
    ])  # fmt: skip
    _refuse_layers({name: (survey.candidates[name], found) for name, found in layer_plans.items() if found})
    ledger = ledger_of(model, survey, layer_plans, operation_plans)
    if not ledger.quantized:
        raise _nothing_to_quantize(model, [(entry.name, entry.kind, entry.reason) for entry in ledger.left_float])
    _refuse_other_plan(model, survey.candidates, layer_plans, operation_plans)
    for name, layer_plan in layer_plans.items():
        if layer_plan and not isinstance(module := survey.candidates[name], QuantizedLayer):
            _swap(module, layer_plan, name)
    attach_operations(model, operation_plans)
    disable_fast_paths(model)
    share_inputs(model)
    if getattr(getattr(type(model), "to_onnx", None), "__module__", "").startswith(
        ("lightning.", "pytorch_lightning.")
    ):
        model.__dict__["to_onnx"] = _to_onnx
    return ledger


def _refuse_layers(planned: Mapping[str, tuple[nn.Module, LayerPlan]]) -> None:
    """Refuses layers that cannot have the quantizers of their plans, by name.

    Raises:
        PlanError: listing them.
    """
    clipped = [
        f"{name}: '{spec}' clips its weight after each step"
        for name, (module, layer_plan) in planned.items()
        if weight_is_computed(module)
        for _, spec in layer_plan.stages_of("weight")
        if spec and make_weight_quantizer(spec, name, (1, 1)).latent_bound is not None
    ]
    raise_all(PlanError, "weights that are computed (weight_norm, pruning, ...) cannot be kept in an interval", clipped)
    clashes = [
        f"{name} ({type(module).__name__}): {', '.join(taken)}"
        for name, (module, _) in planned.items()
        if (taken := _names_taken(module))
    ]
    raise_all(
        PlanError,
        "attributes with names that quantized layers use for something else: rename them, or leave these layers float",
        clashes,
    )


def _swap(module: nn.Module, plan: LayerPlan, name: str) -> None:
    """Turns a layer into a quantized one, with the quantizers of its plan."""
    swapped = quantized_class(module)
    assert swapped is not None
    module.__class__ = swapped
    attach_quantizers(cast(QuantizedLayer, module), plan, name)
    if isinstance(module, CompoundWeight):
        module.enter_owner()


def late_layers(model: nn.Module, ledger: Ledger) -> list[str]:
    """Returns names of layers that came into a prepared model later, and so are float without a reason in the ledger.

    Args:
        model: prepared.
        ledger: of then.
    """
    explained = {entry.name for entry in ledger.left_float}
    return [
        name
        for name, layer in Survey.of(model).candidates.items()
        if not isinstance(layer, QuantizedLayer) and name not in explained
    ]


def _to_onnx(*args: Any, **kwargs: Any) -> None:
    """Stands in for `LightningModule.to_onnx`, which would end in an exporter's error about one of our operators."""
    raise ExportError(
        "a quantized model is written to ONNX by lq_plugin.export.export_onnx(model, (x,), path), not by to_onnx"
    )


def _names_taken(layer: nn.Module) -> list[str]:
    if not isinstance(layer, CompoundWeight):
        return names_taken(layer)
    return (
        []
        if isinstance(layer.owner, QuantizedCompound)
        else names_taken(layer.owner, swapped_compound(type(layer.owner)))
    )


def resolve_layers(plan: QuantPlan | None, survey: Survey, layers: Sequence[LayerInfo]) -> dict[str, LayerPlan]:
    """Returns the plan of each of a model's layers.

    Args:
        plan: with the rules about layers; None where there are none.
        survey: of the model.
        layers: of the survey.

    Raises:
        PlanError: see `QuantPlan.resolve`, with the reasons of modules that cannot hold quantizers.
    """
    if plan is None:
        return dict.fromkeys(survey.candidates, LayerPlan())
    try:
        return plan.resolve(layers, survey.others())
    except PlanError as error:
        reasons = blocked(plan, layers, survey)
        raise PlanError("\n  ".join([str(error), *(f"{name}: {reason}" for name, reason in reasons.items())])) from None


def _nothing_to_quantize(
    model: nn.Module, left_float: Sequence[tuple[str, str, str | None]], why: str = ""
) -> PlanError:
    reasons = (
        "; ".join(f"{name} ({kind}): {reason}" for name, kind, reason in left_float[:5])
        or "it has no layers with weights"
    )
    return PlanError(f"nothing to quantize in {type(model).__name__}{why}: {reasons}")


def remove(model: nn.Module) -> None:
    """Takes all quantizers out of `model`: the float model is back, bit for bit as trained."""
    for _, layer in quantized_layers(model):
        detach_quantizers(layer)
        if isinstance(layer, CompoundWeight):
            layer.leave_owner()
    detach_operations(model)
    restore_fast_paths(model)
    unshare_inputs(model)
    if model.__dict__.get("to_onnx") is _to_onnx:
        del model.__dict__["to_onnx"]


def quantized_layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """Names and modules of the layers that hold quantizers; names are those of the plan."""
    return [
        (name.replace(f"{CONTAINER}.", ""), module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    ]


def quantizers(model: nn.Module) -> list[Quantizer]:
    """All quantizers of `model`, in its order."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def ledger_of(
    model: nn.Module,
    survey: Survey,
    plans: dict[str, LayerPlan],
    operations: Mapping[str, tuple[Operation, LayerPlan]] | None = None,
) -> Ledger:
    entries = []
    weights = {id(layer.weight) for layer in survey.candidates.values() if isinstance(layer, CompoundWeight)}
    for name, kind in survey.kinds.items():
        if (layer := survey.candidates.get(name)) is not None:
            plan = plans[name]
            left_out = layer._left_out if isinstance(layer, QuantizedLayer) else ()
            slots = [slot for slot in cast(Any, quantized_class(layer)).slots if slot not in left_out]
            reason = "; ".join(filter(None, (_missing(plan, slots), why_left_out(layer)))) or None
            # A weight counts as it is used, not as what it is computed from.
            size = weight_of(layer).numel()
            reads = input_owner(name, layer)
            whole = bool(plan.weight and plans[reads].input)
            if isinstance(layer, CompoundWeight):
                shared = f"reads the input of {reads}, quantized there" if reads != name and whole else None
                reason, others = reason or layer.remark or shared, 0
            else:
                sources = {id(source) for source in weight_sources(layer)}
                others = sum(p.numel() for p in layer.parameters(recurse=False) if id(p) not in sources)
            entries.append(Entry(name, kind, plan, reason, size + others, size, all_quantized=whole))
        elif name in survey.reasons:
            module = model.get_submodule(name)
            named = module.named_parameters(recurse=isinstance(module, OPAQUE) or name in survey.aside)
            # A lazy parameter has no size yet.
            owned = [p for key, p in named if id(p) not in weights and not key.startswith(CONTAINER) and not is_lazy(p)]
            counted = 0 if name in survey.aside else sum(p.numel() for p in owned if p.dim() > 1)
            entries.append(Entry(name, kind, LayerPlan(), survey.reasons[name], sum(p.numel() for p in owned), counted))
    for name, (operation, operation_plan) in (operations or {}).items():
        entries.append(Entry(name, operation.op, operation_plan, functional=True))
    return Ledger(entries)


def _missing(plan: LayerPlan, slots: Sequence[str]) -> str | None:
    """Returns the slots that the plan leaves float; outputs are unless asked for: the next layer quantizes them."""
    missing = [slot for slot in slots if slot != "output" and getattr(plan, slot) is None]
    return f"the plan leaves its {' and '.join(missing)} float" if missing else None


def _refuse_other_plan(
    model: nn.Module,
    candidates: dict[str, nn.Module],
    layers: dict[str, LayerPlan],
    operations: Mapping[str, tuple[Operation, LayerPlan]],
) -> None:
    plans = layers | {name: plan for name, (_, plan) in operations.items()}
    prepared = {name: module.layer_plan for name, module in candidates.items() if isinstance(module, QuantizedLayer)}
    prepared |= {name: operation.plan for name, operation in quantized_operations(model)}
    different = [
        name for name in {**plans, **prepared} if prepared.get(name, LayerPlan()) != plans.get(name, LayerPlan())
    ]
    if prepared and different:
        name = different[0]
        raise PlanError(
            f"the model is prepared with another plan already ({len(different)} layers differ, first {name}: "
            f"has {prepared.get(name)}, the plan wants {plans.get(name)}); call lq_plugin.remove(model) first"
        )
