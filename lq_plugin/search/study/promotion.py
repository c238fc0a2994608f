"""Decides which trials continue at the next rung of fidelity: those near the front of their own rung."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Trial, TrialPruned
from optuna.trial import FrozenTrial

from lq_plugin.errors import QuantizationError, did_you_mean
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.evaluation.rungs import Rung, evaluate_layers_at

log = logging.getLogger(__name__)

#: User attribute of a trial: what was logged at each rung that it reached, and the costs.
RUNGS = "levels"
#: User attribute of a trial that stopped below the top: why.
HELD_BACK = "held_back"
#: Margin as a share of the float model's metric, where none is given.
_SHARE = 0.05


class Ladder:
    """Evaluates a trial rung by rung, as long as it is good enough for the next one.

    It climbs from a rung unless another trial of the study, of this or another worker, is better there by more than
    the margin and costs no more, whatever costs there are; the first trials at a rung always do. With one objective
    the study's pruner decides as well.

    Args:
        evaluator: calibrated.
        rungs: the cheapest first.
        metric, costs: the objectives.
        maximize: whether more of the metric is better.
        promote_within: the margin in the metric's unit, of rungs without one of their own; None: a twentieth of what
            the float model scores.
        promote_first: trials at a rung that climb in any case.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        rungs: Sequence[Rung],
        metric: str,
        costs: Sequence[str],
        maximize: bool,
        promote_within: float | None = None,
        promote_first: int = 4,
    ) -> None:
        self.evaluator, self.rungs, self.metric, self.costs = evaluator, tuple(rungs), metric, tuple(costs)
        self.sign = 1.0 if maximize else -1.0
        margin = _SHARE * abs(read(evaluator.float_metrics, metric)) if promote_within is None else promote_within
        self.margins = [margin if rung.promote_within is None else rung.promote_within for rung in self.rungs]
        self.promote_first = promote_first
        for number, rung in enumerate(self.rungs):
            if rung.batches is not None and rung.batches >= evaluator.batches:
                log.warning(
                    "rung %d reads %d batches: the validation has no more than %g",
                    number,
                    rung.batches,
                    evaluator.batches,
                )

    def climb(self, trial: Trial, layer_plans: Mapping[str, LayerPlan], costs: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics of the plan at the top rung, and its costs.

        Rungs that an interrupted trial has completed are not evaluated again by the trial that replaces it.

        Args:
            trial: running.
            layer_plans: its specs by layer name.
            costs: its costs by name.

        Raises:
            TrialPruned: it stops below the top.
            QuantizationError: the metric is not logged, or not a finite number.
        """
        reached: list[dict[str, float]] = list(trial.user_attrs.get(RUNGS, []))
        for number, rung in enumerate(self.rungs):
            new = number == len(reached)
            if new:
                reached.append({**evaluate_layers_at(self.evaluator, layer_plans, rung), **costs})
            value = read(reached[number], self.metric)
            if new:
                trial.set_user_attr(RUNGS, reached)
            alone = len(trial.study.directions) == 1
            if alone:
                trial.report(value, step=number)
            if number < len(self.rungs) - 1:
                reason = self._better(trial, number, value, costs)
                if reason is None and alone and trial.should_prune():
                    reason = "the pruner stopped it"
                if reason is not None:
                    reason = f"rung {number}: {self.metric} {value:.6g}; {reason}"
                    trial.set_user_attr(HELD_BACK, reason)
                    raise TrialPruned(reason)
        return reached[-1]

    def _better(self, trial: Trial, number: int, value: float, costs: Mapping[str, float]) -> str | None:
        """Returns a description of another trial that is so much better at this rung that climbing is pointless."""
        others = [
            t
            for t in trial.study.get_trials(deepcopy=False)
            if t.number != trial.number and len(reached_by(t)) > number
        ]
        if len(others) < self.promote_first:
            return None
        for other in others:
            theirs = reached_by(other)[number]
            ahead = self.sign * (theirs[self.metric] - value)
            if ahead > self.margins[number] and all(theirs[cost] <= costs[cost] for cost in self.costs):
                return " and ".join(
                    [
                        f"trial {other.number} has {theirs[self.metric]:.6g}",
                        *(f"{c} {theirs[c]:.6g}" for c in self.costs),
                    ]
                )
        return None


def reached_by(trial: FrozenTrial) -> list[dict[str, float]]:
    """Returns the metrics of a trial at each rung that it reached; nothing where there is one rung."""
    found: Any = trial.user_attrs.get(RUNGS, [])
    return list(found)


def read(metrics: Mapping[str, float], name: str) -> float:
    """Returns a value that was logged.

    Raises:
        QuantizationError: it was not, or it is NaN or infinite.
    """
    if name not in metrics:
        listing = ", ".join(sorted(metrics)) or "nothing"
        raise QuantizationError(
            f"metric {name!r} is not logged in validation; logged: {listing}.{did_you_mean(name, metrics)}"
        )
    if not math.isfinite(metrics[name]):
        raise QuantizationError(f"metric {name!r} is {metrics[name]}")
    return metrics[name]
