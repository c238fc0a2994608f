"""The report of a prepared model: every number and picture that a page shows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import LayerPlan, QuantPlan, Rule
from lq_plugin.intent.schedule import Moment
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.calibrate import Statistics, evaluating
from lq_plugin.model.graph.record import Recording
from lq_plugin.model.ledger import Ledger
from lq_plugin.model.measure.activation_memory import activation_bytes
from lq_plugin.model.measure.cost import Cost, CostRow, cost
from lq_plugin.model.measure.fidelity import FidelityRow, Measurements, errors_on_statistics, layer_fidelity
from lq_plugin.model.measure.outputs import OutputErrors, output_errors
from lq_plugin.model.measure.stored import stored_bytes
from lq_plugin.model.prepare import prepare
from lq_plugin.model.survey import Survey
from lq_plugin.ptq.reconstruction.learn import UnitResult
from lq_plugin.ptq.reconstruction.reconstruct import Reconstruction
from lq_plugin.quantizers import ActivationQuantizer
from lq_plugin.report.data import LayerReport, ModelReport, ReportData, ScheduledChange, Series, TensorView, digits
from lq_plugin.report.flow import flow
from lq_plugin.report.scores import make_scores
from lq_plugin.report.tensors import activation_view, weight_view
from lq_plugin.report.weights import against_originals, boxes, error_map, rounding

#: Layers that get pictures of their own, the largest first; the others have numbers only.
MAX_DETAILED = 150


def model_report(
    model: nn.Module,
    plan: QuantPlan | None = None,
    *,
    ledger: Ledger | None = None,
    recording: Recording | None = None,
    statistics: Statistics | None = None,
    measured: Measurements | None = None,
    reconstruction: Reconstruction | None = None,
    float_weights: Mapping[str, Tensor] | None = None,
    sensitivity: Mapping[str, float] | None = None,
    latency_ms: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Sequence[Series] = (),
    epoch_steps: int | None = None,
    max_detailed: int = MAX_DETAILED,
    title: str | None = None,
    run: Callable[[], Any] | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    samples: Mapping[str, int] | int | None = None,
    provenance: Mapping[str, str] | None = None,
) -> ReportData:
    """Gathers the values that a page shows of a quantized model, without changing the model.

    Args:
        model: prepared, and calibrated where numbers are wanted.
        plan: that it was prepared with; made from the layers' own specs when None.
        ledger, recording, statistics: of the callback (`QAT.ledger`, `.recording`, `.statistics`).
        measured: activation errors, from `lq_plugin.model.measure.fidelity.watching`; else they come from the
            statistics.
        reconstruction: what `reconstruct` returned.
        float_weights: weights before it, by layer name: errors are measured against them, and roundings that went
            another way than to the nearest level are told. Without them a reconstructed weight seems to lose nothing.
        sensitivity, latency_ms: by layer name.
        metrics: what the model scores.
        training: numbers that were logged.
        epoch_steps: optimizer steps an epoch.
        max_detailed: the largest so many layers get pictures.
        title: of the page; the model's class when None.
        run: runs the model on a batch, the same one each time, for the errors of the layers' outputs.
        scores: metrics by name, by variant: `{"float": {"val/acc": 0.98}, "PTQ": {...}, "QAT": {...}}`.
        samples: that the metrics were computed on, by name or of all: accuracies have an interval then.
        provenance: see `lq_plugin.report.provenance`.

    >>> import torch, lq_plugin
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = lq_plugin.prepare(net, "w4a8")
    >>> statistics = lq_plugin.calibrate(net, [torch.randn(64, 8)])
    >>> report = model_report(net, statistics=statistics)
    >>> [(layer.name, layer.weight_bits, sorted(layer.sqnr_db)) for layer in report.model.layers]
    [('0', 4, ['input', 'weight']), ('2', 4, ['input', 'weight'])]
    """
    statistics = statistics or {}
    survey = Survey.of(model)
    plan = plan or plan_of(survey)
    ledger = ledger if ledger is not None and len(ledger) else prepare(model, plan)
    known = {name: errors for name, errors in (measured or {}).items() if errors.elements}
    weights_before = float_weights or {}
    rows: dict[str, list[FidelityRow]] = {}
    priced = cost(model, recording)
    detailed = {row.name for row in sorted(priced, key=lambda row: -row.elements)[:max_detailed]}
    entries = {entry.name: entry for entry in ledger}
    outputs = {} if run is None else output_errors(model, run, float_weights)
    layers = []
    with evaluating(model), torch.no_grad():
        # Stochastic rounding is nearest in evaluation, as in what is exported.
        measurements = layer_fidelity(model, measured=errors_on_statistics(model, statistics) | known)
        for measurement in against_originals(measurements, survey.candidates, weights_before):
            rows.setdefault(measurement.layer, []).append(measurement)
        for row in priced:
            module = survey.candidates[row.name]
            reason = entries[row.name].reason if row.name in entries else None
            layer = module if isinstance(module, QuantizedLayer) else None
            before = weights_before.get(row.name)
            details: dict[str, Any] = {
                "sensitivity": _of(sensitivity, row.name),
                "latency_ms": _of(latency_ms, row.name),
                "output_db": _decibels(outputs.get(row.name)),
            }
            if row.name in detailed:
                layer_plan = LayerPlan() if layer is None else layer.layer_plan
                details["flow"] = flow(row.name, module, row.kind, layer_plan, recording, reason)
                if layer is not None:
                    details["views"] = _views(layer, statistics, before)
                    details |= _pictures(layer, before, *_unit_of(row.name, reconstruction))
            layers.append(_layer(row, module, layer, rows.get(row.name, []), reason, details))
    report = ModelReport(
        name=type(model).__name__,
        plan=plan.to_yaml(),
        totals=_totals(priced) | _memory(recording, survey),
        layers=layers,
        weight_coverage=digits(ledger.weight_coverage),
        compute_coverage=None if ledger.compute_coverage is None else digits(ledger.compute_coverage),
        ledger=ledger.rows(),
        metrics={name: digits(value, 6) for name, value in (metrics or {}).items() if isfinite(value)},
        schedule=moments(plan),
        training=list(training),
        epoch_steps=epoch_steps,
        scores=make_scores(scores or {}, samples),
        stored=stored_bytes(model, priced),
    )
    return ReportData(title or type(model).__name__, model=report, provenance=dict(provenance or {}))


def plan_of(survey: Survey) -> QuantPlan:
    """Returns the plan that the layers of a model were prepared with, one rule for each layer and stage."""
    rules = []
    for name, module in survey.candidates.items():
        if not isinstance(module, QuantizedLayer):
            continue
        found = module.layer_plan
        for slot in SLOTS:
            for start, spec in found.stages_of(slot):
                if spec is not None or start is not None or len(found.stages_of(slot)) > 1:
                    chosen: dict[str, Any] = {slot: spec or "float"}
                    rules.append(Rule(name, **chosen, start=start))
    return QuantPlan(rules or [Rule("*", weight="float")])


def moments(plan: QuantPlan) -> list[ScheduledChange]:
    """Returns the moments of a run at which something changes, the earliest first; epochs and steps are kept apart."""
    labels = {
        "weights_start": "weights are quantized",
        "activations_start": "activations are quantized",
        "observer_freeze": "ranges stop moving",
        "batch_norm_freeze": "batch norms freeze",
    }
    moments = ((label, getattr(plan.schedule, key)) for key, label in labels.items())
    found = [
        ScheduledChange(label, moment.unit, moment.count) for label, moment in moments if isinstance(moment, Moment)
    ]
    for rule in plan.rules:
        if isinstance(rule.start, Moment):
            what = ", ".join(f"{slot} {getattr(rule, slot)}" for slot in SLOTS if getattr(rule, slot) is not None)
            found.append(ScheduledChange(f"{rule.match}: {what}", rule.start.unit, rule.start.count))
    return sorted(found, key=lambda change: (change.count > 0, change.unit, change.count))


def _layer(
    row: CostRow,
    module: Any,
    layer: QuantizedLayer | None,
    measured: list[FidelityRow],
    reason: str | None,
    details: dict[str, Any],
) -> LayerReport:
    specs = (
        {}
        if layer is None
        else {slot: str(spec) for slot in SLOTS if (spec := getattr(layer.layer_plan, slot)) is not None}
    )
    bounds = {
        r.slot: [digits(r.minimum), digits(r.maximum)]
        for r in measured
        if r.minimum is not None and r.maximum is not None
    }
    return LayerReport(
        name=row.name,
        kind=row.kind,
        shape=[int(size) for size in module.weight.shape],
        specs=specs,
        weight_bits=row.weight_bits,
        input_bits=row.input_bits,
        elements=row.elements,
        bytes=row.bytes,
        float_bytes=row.float_bytes,
        effective_bits=None if row.effective_bits is None else digits(row.effective_bits),
        macs=row.macs,
        bops=row.bops,
        tied_to=row.tied_to,
        reason=reason,
        sqnr_db={r.slot: digits(r.sqnr_db) for r in measured if r.sqnr_db is not None},
        clipped={r.slot: digits(r.clipping_share, 3) for r in measured if r.clipping_share is not None},
        bounds=bounds,
        **details,
    )


def _pictures(layer: QuantizedLayer, before: Tensor | None, unit: str, learned: UnitResult | None) -> dict[str, Any]:
    return {
        "boxes": boxes(layer, before),
        "error": error_map(layer, before),
        "rounding": rounding(layer, before, unit, learned),
    }


def _views(layer: QuantizedLayer, statistics: Statistics, before: Tensor | None) -> list[TensorView]:
    views = [weight_view(layer, before)]
    for slot in SLOTS[1:]:
        quantizer = getattr(layer, f"{slot}_quantizer")
        current = None if quantizer is None else quantizer.current
        histogram = None if current is None else statistics.get(current.name)
        if isinstance(current, ActivationQuantizer) and histogram is not None and bool(histogram.total.all()):
            views.append(activation_view(current, histogram, slot))
    return [view for view in views if view is not None]


def _unit_of(name: str, reconstruction: Reconstruction | None) -> tuple[str, UnitResult | None]:
    """Returns the unit that a layer was reconstructed in: the layer, or the innermost module around it."""
    units = (
        {}
        if reconstruction is None
        else {title.split(" + ")[0]: (title, result) for title, result in reconstruction.units.items()}
    )
    while name and name not in units:
        name = name.rpartition(".")[0]
    return units.get(name, ("", None))


def _totals(priced: Cost) -> dict[str, float | None]:
    return {name: None if value is None else digits(value, 6) for name, value in priced.totals().items()}


def _memory(recording: Recording | None, survey: Survey) -> dict[str, float | None]:
    """Returns the bytes of activations of a sample, as the plan has them and in float; nothing without a recording."""
    if recording is None:
        return {}
    plans = {name: layer.layer_plan for name, layer in survey.candidates.items() if isinstance(layer, QuantizedLayer)}
    return {
        "activation_bytes": digits(activation_bytes(recording, plans), 6),
        "float_activation_bytes": digits(activation_bytes(recording), 6),
    }


def _decibels(errors: OutputErrors | None) -> dict[str, float]:
    if errors is None:
        return {}
    return {"alone": digits(errors.alone.sqnr_db), "along": digits(errors.along.sqnr_db)}


def _of(values: Mapping[str, float] | None, name: str) -> float | None:
    return None if values is None or name not in values else digits(values[name])
