"""What Optuna calls for one trial: suggest, evaluate, note what happened."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from optuna import Trial
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.errors import QuantizationError, did_you_mean
from lq_plugin.model.cost import Cost
from lq_plugin.search.evaluator import Evaluator

#: Totals of the cost model that a search can minimize.
COSTS = ("effective_bits", "bytes", "bops")
#: Names of the user attributes of a trial.
PLAN, METRICS, SECONDS, ERROR, REPEATS = "plan", "metrics", "seconds", "error", "repeats"
#: Of trials whose plan was not sampled: where it comes from, and which interrupted trial it tries again.
ORIGIN, RETRIES = "origin", "retries"


class Objective:
    """`(metric, cost)` of the plan that a trial stands for.

    Every trial gets the user attributes `plan` (a mapping that `QuantPlan.from_dict` reads), `metrics`
    (all that was logged, and the cost), `seconds`, and `error` (the traceback) when it raised. A
    trial with the parameters of an earlier one takes its values over, and `repeats` names it.

    Args:
        evaluator: calibrated.
        metric: a name that the validation logs.
        cost: one of `COSTS`.

    Raises:
        QuantizationError: when the float model did not log the metric, or the cost is unknown.
    """

    def __init__(self, evaluator: Evaluator, metric: str, cost: str = "effective_bits") -> None:
        if cost not in COSTS:
            raise QuantizationError(f"unknown cost {cost!r}; valid: {', '.join(COSTS)}.{did_you_mean(cost, COSTS)}")
        self.evaluator = evaluator
        self.metric = metric
        self.cost = cost
        self.interrupted: Trial | None = None
        self._known: dict[frozenset[tuple[str, Any]], tuple[int, dict[str, float]]] = {}
        self._read(evaluator.float_metrics, metric)

    def remember(self, trials: Iterable[FrozenTrial]) -> None:
        """Take these trials for evaluated: earlier ones of the same study."""
        for trial in trials:
            if trial.state == TrialState.COMPLETE:
                self._known.setdefault(frozenset(trial.params.items()), (trial.number, dict(trial.user_attrs[METRICS])))

    def __call__(self, trial: Trial) -> tuple[float, float]:
        started = time.perf_counter()
        try:
            space = self.evaluator.space
            assert space is not None
            params = space.suggest(trial)
            trial.set_user_attr(PLAN, space.plan(params).to_dict())
            key = frozenset(params.items())
            if key in self._known:
                number, metrics = self._known[key]
                trial.set_user_attr(REPEATS, number)
            else:
                evaluation = self.evaluator.evaluate_layers(space.layer_plans(params))
                metrics = evaluation.metrics | cost_totals(evaluation.cost)
            values = self._read(metrics, self.metric), self._read(metrics, self.cost)
            trial.set_user_attr(METRICS, metrics)
            self._known.setdefault(key, (trial.number, metrics))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self.interrupted = trial
            trial.set_user_attr(ERROR, traceback.format_exc())
            raise
        finally:
            trial.set_user_attr(SECONDS, time.perf_counter() - started)
        return values

    @staticmethod
    def _read(metrics: Mapping[str, float], name: str) -> float:
        if name not in metrics:
            listing = ", ".join(sorted(metrics)) or "nothing"
            raise QuantizationError(f"metric {name!r} is not logged in validation; logged: {listing}.{did_you_mean(name, metrics)}")
        if not math.isfinite(metrics[name]):
            raise QuantizationError(f"metric {name!r} is {metrics[name]}")
        return metrics[name]


def cost_totals(cost: Cost) -> dict[str, float]:
    """The totals that trials carry beside the metrics."""
    return {name: value for name in COSTS if (value := getattr(cost, name)) is not None}
