"""A pruner for trials with several objectives: Optuna's own pruners take one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna import Study
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.errors import QuantizationError, is_integer, raise_all

#: User attribute of a trial with several objectives: what it costs, and the metric by step.
REPORTS = "reports"
_COSTS, _STEPS = "costs", "steps"


class DominancePruner(BasePruner):
    """Ends a trial that is unlikely to reach the front, judged by its reported values so far.

    Its costs are known before it is trained. It ends where enough complete trials that cost no more, whatever costs
    there are, had a metric at the same step that was better by more than `margin`. The metric is the first objective;
    all others are costs.

    Args:
        margin: by how much, in the metric's unit, a trial may be worse and still continue.
        n_dominating: complete trials that must be ahead of it.
        n_startup_trials: complete trials before anything is pruned.
        n_warmup_steps: steps of a trial before it can be pruned.
        interval_steps: steps from one decision to the next.

    Raises:
        QuantizationError: listing what cannot be.
    """

    def __init__(
        self,
        margin: float = 0.0,
        n_dominating: int = 2,
        n_startup_trials: int = 5,
        n_warmup_steps: int = 0,
        interval_steps: int = 1,
    ) -> None:
        faults = [] if margin >= 0 else [f"margin must not be negative, got {margin!r}"]
        counts = {"n_dominating": n_dominating, "n_startup_trials": n_startup_trials, "n_warmup_steps": n_warmup_steps}
        least = {"n_dominating": 1, "interval_steps": 1}
        for name, value in {**counts, "interval_steps": interval_steps}.items():
            low = least.get(name, 0)
            if not is_integer(value, low):
                faults.append(f"{name} is an integer from {low}, got {value!r}")
        raise_all(QuantizationError, "DominancePruner", faults)
        self.margin, self.n_dominating, self.n_startup_trials = margin, n_dominating, n_startup_trials
        self.n_warmup_steps, self.interval_steps = n_warmup_steps, interval_steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Returns whether the trial should end after its last reported step."""
        course = _course(trial)
        step = max(course, default=-1)
        if step < self.n_warmup_steps or (step - self.n_warmup_steps) % self.interval_steps:
            return False
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        costs = trial.user_attrs.get(REPORTS, {}).get(_COSTS, [])
        if len(complete) < self.n_startup_trials or len(costs) != len(study.directions) - 1:
            return False
        signs = [1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in study.directions]
        ahead = 0
        for other in complete:
            theirs = _course(other)
            if step not in theirs or any(excess > 0 for excess in other.constraints.values()):
                continue
            better = signs[0] * (theirs[step] - course[step]) > self.margin
            cheaper = all(sign * (b - a) >= 0 for sign, a, b in zip(signs[1:], costs, other.values[1:], strict=True))
            ahead += better and cheaper
        return ahead >= self.n_dominating


def with_report(known: Mapping[str, Any] | None, costs: list[float], value: float, step: int) -> dict[str, Any]:
    """Returns the attribute `REPORTS` after one more step.

    Args:
        known: the attribute so far, or None.
        costs: of the trial.
        value: of the metric.
        step: that it was reported at.
    """
    return {_COSTS: costs, _STEPS: {**(known or {}).get(_STEPS, {}), str(step): value}}


def _course(trial: FrozenTrial) -> dict[int, float]:
    """Returns the metric by step."""
    reported = trial.user_attrs.get(REPORTS, {}).get(_STEPS, {})
    return {int(step): value for step, value in reported.items()} or dict(trial.intermediate_values)
