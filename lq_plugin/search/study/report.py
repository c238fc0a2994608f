"""The report of a search: its front, best plans, important parameters, and progress after each trial."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.report.data import BestPlan, ReportData, Sensitivity, StudyReport, TrialReport, digits
from lq_plugin.search.evaluation.costs import PRICED
from lq_plugin.search.study.candidates import Candidate, StudyCandidates
from lq_plugin.search.study.confidence import CONFIRM
from lq_plugin.search.study.objective import MEASURE, SENSITIVITY
from lq_plugin.utilities.front import pareto_front

#: Plans whose bits are shown layer by layer.
MAX_BEST = 40
#: Parameters, next to metric and costs, that parallel coordinates show.
MAX_PARAMETERS = 8
#: Shown importances.
MAX_IMPORTANCE = 30


def study_report(result: StudyCandidates, title: str | None = None) -> ReportData:
    """Gathers the values that a page shows of a search.

    Args:
        result: of `lq_plugin.search.search`, or of a study that was loaded.
        title: of the page; the study's name when None.
    """
    candidates = result.candidates
    front = {c.number for c in result.front}
    confirmed = result.study.user_attrs.get(CONFIRM)
    trials = [
        TrialReport(
            number=c.number,
            metric=digits(c.metric, 6),
            cost=digits(c.cost, 6),
            origin=c.origin,
            seconds=digits(c.seconds, 3),
            numbers={name: digits(value, 6) for name, value in c.metrics.items()},
            front=c.number in front,
            **_again(c, confirmed),
        )
        for c in candidates
    ]
    best = sorted(result.front, key=lambda c: c.bound, reverse=result.maximize)[:MAX_BEST]
    layers = list(dict.fromkeys(rule.match for c in best for rule in c.plan.rules))
    importance = parameter_importance(result)
    chosen = list(importance)[:MAX_PARAMETERS]
    by_number = {trial.number: trial.params for trial in result.study.get_trials(deepcopy=False)}
    params = [by_number[c.number] for c in candidates]
    report = StudyReport(
        name=result.study.study_name,
        metric=result.metric,
        cost=result.cost,
        costs=_costs(result),
        maximize=result.maximize,
        trials=trials,
        float_metric=None
        if result.metric not in result.float_metrics
        else digits(result.float_metrics[result.metric], 6),
        float_bytes=result.float_bytes,
        layers=layers,
        best=[_best(c, layers) for c in best],
        importance={name: digits(value) for name, value in list(importance.items())[:MAX_IMPORTANCE]},
        hypervolume=hypervolume([(c.cost, c.metric) for c in candidates], result.maximize),
        parameters={name: [values.get(name) for values in params] for name in chosen},
        confidence=None if confirmed is None else confirmed["level"],
    )
    return ReportData(title or result.study.study_name, study=report, sensitivity=_sensitivity(result.study.user_attrs))


def _again(candidate: Candidate, confirmed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the fields of a trial in a study whose plans were scored again."""
    if confirmed is None:
        return {}
    known, bound = candidate.interval, {"bound": digits(candidate.bound, 6)}
    if known is None:
        return bound
    numbers = {"mean": known.mean, "low": known.low, "high": known.high}
    return {name: digits(value, 6) for name, value in numbers.items()} | bound | {"looks": known.looks}


def _sensitivity(attributes: Mapping[str, Any]) -> Sensitivity | None:
    """Returns what the first plans were chosen by; None where the search began without."""
    if not (found := attributes.get(SENSITIVITY)):
        return None
    values = {unit: {choice: digits(value) for choice, value in row.items()} for unit, row in found.items()}
    return Sensitivity(attributes.get(MEASURE, ""), values)


def _costs(result: StudyCandidates) -> list[str]:
    """Returns the costs, next to the metric, that all trials have."""
    shared = set.intersection(*(set(c.metrics) for c in result.candidates)) if result.candidates else set()
    usual = [name for name in PRICED if name in shared]
    return list(dict.fromkeys([result.cost, *usual, *sorted(name for name in shared if "latency" in name)]))


def _best(candidate: Candidate, layers: Sequence[str]) -> BestPlan:
    weights, inputs = bits_by_match(candidate.plan)
    return BestPlan(
        candidate.number, [weights.get(n) for n in layers], [inputs.get(n) for n in layers], candidate.plan.to_yaml()
    )


def bits_by_match(plan: QuantPlan) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the bit-widths of weights and inputs by the pattern of their rule; in a search's plans a layer's name.

    >>> bits_by_match(QuantPlan.parse({"rules": [{"match": "conv", "weight": "int4", "input": "float"}]}))
    ({'conv': 4}, {})
    """
    found: dict[str, dict[str, int]] = {slot: {} for slot in SLOTS}
    for rule in plan.rules:
        for slot in SLOTS:
            value = getattr(rule, slot)
            if isinstance(value, QuantSpec):
                found[slot][rule.match] = value.bit_width
            elif value is not None:
                found[slot].pop(rule.match, None)
    return found["weight"], found["input"]


def parameter_importance(result: StudyCandidates) -> dict[str, float]:
    """Returns the share of the metric's variation that each parameter accounts for (PED-ANOVA), largest first.

    Empty with fewer than 8 trials, or where all score the same.

    Reference: Watanabe et al., "PED-ANOVA", IJCAI 2023 (arXiv 2304.10255).
    """
    if len(result.candidates) < 8 or len({c.metric for c in result.candidates}) < 2:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    from lq_plugin.search.shared.database import quiet

    with quiet(), warnings.catch_warnings():
        # It says that smaller targets count as better, which the sign is for.
        warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes", UserWarning)
        sign = -1.0 if result.maximize else 1.0
        found = get_param_importances(
            result.study, evaluator=PedAnovaImportanceEvaluator(), target=lambda trial: sign * trial.values[0]
        )
    return {name: float(value) for name, value in sorted(found.items(), key=lambda item: -item[1])}


def hypervolume(points: Sequence[tuple[float, float]], maximize: bool) -> list[float]:
    """Returns the share of the box between worst and best values that the trials so far dominate, after each trial.

    Args:
        points: `(cost, metric)`, costs are the better the smaller.
        maximize: whether more of the metric is better.

    >>> hypervolume([(4.0, 0.9), (2.0, 0.5), (3.0, 0.9), (2.0, 0.9)], maximize=True)
    [0.0, 0.0, 0.5, 1.0]
    """
    if not points:
        return []
    costs, metrics = zip(*points, strict=True)
    width, height = max(costs) - min(costs) or 1.0, max(metrics) - min(metrics) or 1.0
    worst = min(metrics) if maximize else max(metrics)
    sign = 1.0 if maximize else -1.0
    # Both axes 0..1, more is better: how much of the cost is saved, how much of the metric is gained.
    scaled = [((max(costs) - c) / width, sign * (m - worst) / height) for c, m in points]
    found: list[float] = []
    kept: list[tuple[float, float]] = []
    for point in scaled:
        kept.append(point)
        kept = [kept[index] for index in pareto_front([(-x, y) for x, y in kept])]
        area, floor = 0.0, 0.0
        # From the largest saving on: each adds what it rises above those before.
        for x, y in kept:
            area += x * (y - floor)
            floor = y
        found.append(digits(area))
    return found
