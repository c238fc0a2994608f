"""The complete trials of a study, the front that they form, and the best plan of a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.search.study.confidence import CONFIRM, Interval, interval, looks_in, quantile, spread
from lq_plugin.search.study.objective import METRICS, ORIGIN, PLAN, SECONDS, held_back
from lq_plugin.search.study.promotion import reached_by
from lq_plugin.utilities.front import pareto_front


@dataclass(frozen=True)
class Candidate:
    """One complete trial.

    Args:
        number: of the trial.
        plan: that it evaluated.
        metric: its first objective.
        cost: its size: the second objective, or the effective bits where there is none.
        values: all objectives.
        metrics: everything its validation logged, and all costs.
        origin: `"uniform 4 bits"`, or `"sampled"`.
        seconds: that it took.
        lower: what it scored at each rung of fidelity below the top; empty where there is one rung.
        interval: of its scores after it was chosen, see `lq_plugin.search.study.confidence`; None of a plan that was
            scored once.
        bound: what its metric is at least, or at most where less is better, as far as is known: the interval's end, or
            the metric less the noise that looks at other plans have shown; the metric itself where there are none.
    """

    number: int
    plan: QuantPlan
    metric: float
    cost: float
    metrics: Mapping[str, float]
    origin: str
    seconds: float
    values: tuple[float, ...]
    lower: tuple[Mapping[str, float], ...] = ()
    interval: Interval | None = None
    bound: float = float("nan")

    @property
    def estimate(self) -> float:
        """Estimate of its metric: the mean of its looks, or what the trial scored where there are none."""
        return self.metric if self.interval is None else self.interval.mean

    @property
    def confirmed(self) -> dict[str, float]:
        """The interval as numbers by name: `confirmed/mean`, `low`, `high`, `looks`; empty where there is none."""
        if self.interval is None:
            return {}
        found = self.interval
        numbers = {"mean": found.mean, "low": found.low, "high": found.high, "looks": found.looks}
        return {f"confirmed/{name}": value for name, value in numbers.items()}

    @property
    def effective_bits(self) -> float:
        """Mean bits of a parameter of the model, including scales and zero points."""
        return self.metrics["effective_bits"]

    @property
    def file_name(self) -> str:
        """Name of its plan file."""
        return f"plan_{self.number:03d}_{self.effective_bits:.2f}bits.yaml"

    @classmethod
    def of(cls, trial: FrozenTrial, cost: str) -> Candidate:
        """Read a complete trial; `cost` names what its size is measured by."""
        attrs, values = trial.user_attrs, tuple(trial.values)
        plan, metrics, origin = QuantPlan.from_dict(attrs[PLAN]), attrs[METRICS], attrs.get(ORIGIN, "sampled")
        lower = tuple(reached_by(trial)[:-1])
        return cls(
            trial.number,
            plan,
            values[0],
            metrics[cost],
            metrics,
            origin,
            attrs.get(SECONDS, 0.0),
            values,
            lower,
            bound=values[0],
        )


class StudyCandidates:
    """The complete trials of a study so far, those of all workers and earlier runs.

    Args:
        study: the metric is its first objective, costs are the others.
        metric, costs: their names.
        maximize: whether more of the metric is better.
        float_metrics: what the float model scores.
        float_bytes: size of the float model.

    Attributes:
        candidates: every complete trial that keeps the constraints, by number; with several rungs of fidelity those of
            the top.
        held_back: number of trials that stopped below the top rung.
    """

    def __init__(
        self,
        study: Study,
        metric: str,
        costs: Sequence[str],
        maximize: bool,
        float_metrics: Mapping[str, float],
        float_bytes: int | None = None,
    ) -> None:
        self.study, self.metric, self.maximize = study, metric, maximize
        #: What sizes are compared by.
        self.cost = costs[0] if costs else "effective_bits"
        self.float_metrics, self.float_bytes = dict(float_metrics), float_bytes
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self.held_back = len(held_back(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))))
        self.candidates = [
            Candidate.of(trial, self.cost)
            for trial in complete
            if all(excess <= 0 for excess in trial.constraints.values())
        ]
        attributes = study.user_attrs
        if CONFIRM in attributes:
            self.candidates = _judged(self.candidates, attributes, maximize)

    @cached_property
    def front(self) -> list[Candidate]:
        """The candidates that no other is better than in every objective, by cost; of equal ones the first.

        Metrics are compared by their bounds, where plans were scored again.
        """
        if len(self.study.directions) < 3:
            found = pareto_front([(c.cost, c.bound) for c in self.candidates], self.maximize)
            return [self.candidates[index] for index in found]
        signs = [-1.0 if self.maximize else 1.0] + [1.0] * (len(self.study.directions) - 1)
        losses = np.array(
            [
                [sign * value for sign, value in zip(signs, (c.bound, *c.values[1:]), strict=True)]
                for c in self.candidates
            ]
        )
        distinct = [
            c
            for i, c in enumerate(self.candidates)
            if not any(_beats(losses[j], losses[i], j < i) for j in range(len(losses)))
        ]
        return sorted(distinct, key=lambda c: (c.cost, c.bound))

    def best(self, cost: float | None = None) -> Candidate:
        """Returns the candidate with the best metric, by its bound, whose cost is at most `cost`.

        Raises:
            QuantizationError: when there is none.
        """
        allowed = sorted(
            (c for c in self.front if cost is None or c.cost <= cost), key=lambda c: c.bound, reverse=not self.maximize
        )
        if not allowed:
            least = f"the smallest has {self.front[0].cost:.4g}" if self.front else "no trial is complete"
            raise QuantizationError(f"no plan with {self.cost} <= {cost}: {least}")
        return allowed[-1]


def _beats(mine: np.ndarray, other: np.ndarray, earlier: bool) -> bool:
    """Returns whether `mine` is nowhere worse, and better somewhere or equal and earlier."""
    return bool((mine <= other).all() and ((mine < other).any() or earlier))


def _judged(candidates: Sequence[Candidate], attributes: Mapping[str, Any], maximize: bool) -> list[Candidate]:
    """Returns the candidates with intervals and bounds.

    Args:
        candidates: of a study.
        attributes: of the study, with its looks.
        maximize: whether more of the metric is better.
    """
    level, share = attributes[CONFIRM]["level"], attributes[CONFIRM]["looks"]["share"]
    sign = 1.0 if maximize else -1.0
    looks = looks_in(attributes)
    noise = spread(looks.values())
    # A trial reads more batches than a look.
    once = 0.0 if noise is None else quantile(noise[1], level) * noise[0] * share**0.5
    found = []
    for c in candidates:
        scores = list(looks.get(c.number, {}).values())
        numbers = [score for score in scores if score is not None]
        known = interval(numbers, level) if len(numbers) == len(scores) else None
        if len(numbers) < len(scores):
            bound = -sign * inf  # a plan that may score no number is no good one
        elif known is None:
            bound = c.metric - sign * once
        else:
            bound = known.low if maximize else known.high
        found.append(replace(c, interval=known, bound=bound))
    return found
