"""One report of a model and of the search that its plan comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import yaml

from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.report.data import LayerReport, ModelReport, ReportData, Score, StudyReport
from lq_plugin.report.scores import make_scores


def joined(model: ReportData, study: ReportData) -> ReportData:
    """Returns the report of a model with that of a search: the trial of its plan, what it scored, and sensitivities.

    Where the model's plan is on the front, the float model's score and that of the trial, which is PTQ, come from the
    search; they have intervals where the model's own score says on how many samples.

    Args:
        model: whose title, files and notes the page has.
        study: of the search.
    """
    sensitivity = model.sensitivity or study.sensitivity
    report = replace(model, study=study.study, sensitivity=sensitivity)
    if report.provenance == {}:
        report = replace(report, provenance=study.provenance)
    if report.model is None or report.study is None:
        return report
    trained = trial_of(report.model, report.study)
    # A search of another plan may be one of another model.
    scores = report.model.scores if trained is None else _with_scores(report.model, report.study, trained)
    return with_sensitivity(replace(report, trained=trained, model=replace(report.model, scores=scores)))


def trial_of(model: ModelReport, study: StudyReport) -> int | None:
    """Returns the number of the trial on the front that has the model's rules; its schedule may be another."""
    wanted = _rules(model.plan)
    return next((best.number for best in study.best if wanted and _rules(best.plan) == wanted), None)


def with_sensitivity(report: ReportData) -> ReportData:
    """Returns the report with the harm of each layer's weight as it is, where that was measured."""
    if report.model is None or report.sensitivity is None:
        return report
    values = report.sensitivity.values
    layers = [_layer(layer, values) for layer in report.model.layers]
    return replace(report, model=replace(report.model, layers=layers))


def _layer(layer: LayerReport, values: Mapping[str, Mapping[str, float]]) -> LayerReport:
    harm = values.get(f"{layer.name}.weight", {}).get(layer.specs.get("weight", "float"))
    return layer if harm is None or layer.sensitivity is not None else replace(layer, sensitivity=harm)


def _rules(plan: str) -> list[dict[str, str]] | None:
    """Returns the rules of a plan in YAML; None where a report holds another text."""
    try:
        return [rule.to_dict() for rule in QuantPlan.from_dict(yaml.safe_load(plan)).rules]
    except (QuantizationError, yaml.YAMLError, RecursionError, TypeError, ValueError):  # an edited report
        return None


def _with_scores(model: ModelReport, study: StudyReport, trained: int) -> list[Score]:
    own = [score for score in model.scores if score.metric == study.metric]
    samples = next((score.samples for score in own if score.samples is not None), None)
    known = {score.variant for score in own}
    more: dict[str, dict[str, float]] = {}
    if "float" not in known and study.float_metric is not None:
        more["float"] = {study.metric: study.float_metric}
    trial = next((trial for trial in study.trials if trial.number == trained), None)
    if "PTQ" not in known and trial is not None:
        more["PTQ"] = {study.metric: trial.metric}
    if not own and study.metric in model.metrics:
        more["this model"] = {study.metric: model.metrics[study.metric]}
    first = make_scores(more, samples)
    return [*first, *model.scores] if first else model.scores
