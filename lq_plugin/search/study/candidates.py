"""The complete trials of a study, the front that they form, and the best plan of a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, isfinite
from typing import Any

import numpy as np
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.search.study.confidence import CONFIRM, Interval, interval, looks_in, quantile, spread, usable
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
        """Reads a complete trial; `cost` names what its size is measured by."""
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
            the top. Those on the metric are kept by what looks say, where there are any.
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
        self._complete = len(complete)
        found = [Candidate.of(trial, self.cost) for trial in complete]
        attributes = study.user_attrs
        if CONFIRM in attributes:
            found = _judged(found, attributes, maximize)
        self.candidates = [c for c, trial in zip(found, complete, strict=True) if _keeps(c, metric, trial.constraints)]
        #: True where every plan has a look that is no number, so that trials' own scores decide.
        self.unconfirmed = bool(self.candidates) and not any(isfinite(c.bound) for c in self.candidates)
        if self.unconfirmed:
            self.candidates = [replace(c, bound=c.metric) for c in self.candidates]

    @cached_property
    def front(self) -> list[Candidate]:
        """The candidates that no other is better than in every objective, by cost; of equal ones the first.

        Metrics are compared by their bounds, where plans were scored again.
        """
        sound = [c for c in self.candidates if isfinite(c.bound)]
        if len(self.study.directions) < 3:
            return [sound[index] for index in pareto_front([(c.cost, c.bound) for c in sound], self.maximize)]
        signs = [-1.0 if self.maximize else 1.0] + [1.0] * (len(self.study.directions) - 1)
        losses = np.array(
            [[sign * value for sign, value in zip(signs, (c.bound, *c.values[1:]), strict=True)] for c in sound]
        )
        distinct = [
            c for i, c in enumerate(sound) if not any(_beats(losses[j], losses[i], j < i) for j in range(len(losses)))
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
            limit = "" if cost is None else f" with {self.cost} <= {cost}"
            reason = "no trial is complete"
            if self.front:
                reason = f"the smallest has {self.front[0].cost:.4g}"
            elif self._complete:
                reason = f"of {self._complete} complete trials none keeps the constraints"
            raise QuantizationError(f"no plan{limit}: {reason}")
        return allowed[-1]


def _beats(mine: np.ndarray, other: np.ndarray, earlier: bool) -> bool:
    """Returns whether `mine` is nowhere worse, and better somewhere or equal and earlier."""
    return bool((mine <= other).all() and ((mine < other).any() or earlier))


def _keeps(candidate: Candidate, metric: str, excess: Mapping[str, float]) -> bool:
    """Returns whether a candidate keeps the constraints; those on the metric by its estimate.

    Args:
        candidate: with its interval, where it has one.
        metric: name of its first objective.
        excess: by how much its trial's own values break each constraint.
    """
    # The difference rather than the limit, of which the text has six digits.
    moved = candidate.estimate - candidate.metric
    for text, value in excess.items():
        more = 0.0
        if moved and text.split(" ")[0] == metric:
            more = moved if Constraint.parse(text).relation == "<=" else -moved
        if value + more > 0:
            return False
    return True


def _judged(candidates: Sequence[Candidate], attributes: Mapping[str, Any], maximize: bool) -> list[Candidate]:
    """Returns the candidates with intervals and bounds.

    Args:
        candidates: of a study.
        attributes: of the study, with its looks.
        maximize: whether more of the metric is better.
    """
    level, share = attributes[CONFIRM]["level"], attributes[CONFIRM]["looks"]["share"]
    sign = 1.0 if maximize else -1.0
    looks, _ = usable(looks_in(attributes))
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
