"""The function that Optuna calls for one trial: suggest a plan, evaluate it, note the results."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optuna import Trial, TrialPruned
from optuna.trial import FrozenTrial, TrialState

from lq_plugin.errors import QuantizationError, did_you_mean, raise_all
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.search.evaluation.costs import COSTS, unknown_costs
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.search.space.model_space import as_plan
from lq_plugin.search.study.promotion import RUNGS, Ladder, reached_by, read

#: Names of the user attributes of a trial.
PLAN, METRICS, SECONDS, ERROR, REPEATS = "plan", "metrics", "seconds", "error", "repeats"
#: Of trials whose plan was not sampled: where it comes from, and which interrupted trial it tries again.
ORIGIN, RETRIES = "origin", "retries"
#: User attributes of a study: the harm of each choice of each unit, by which its first trials were chosen; its measure.
SENSITIVITY, MEASURE, PAIRS = "sensitivity", "sensitivity_measure", "sensitivity_pairs"


#: Trials whose plan is evaluated, or will be.
_TAKEN = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)


class Objective:
    """Returns `(metric, *costs)` of the plan of a trial.

    Every trial gets the user attributes `plan` (a mapping that `QuantPlan.from_dict` reads), `metrics`
    (all that was logged, and the costs), `seconds`, and `error` (the traceback) when it raised. Two kinds of trials are
    pruned before they are evaluated: one with the parameters of an earlier trial, which `repeats` names, and one whose
    cost breaks a constraint. With several rungs of fidelity a trial that stops below the top is pruned also; its
    attribute `levels` has what it scored at each.

    Args:
        evaluator: calibrated.
        metric: a name that the validation logs.
        costs: some of `COSTS`.
        constraints: on costs and on logged metrics.
        ladder: where there are several rungs of fidelity.

    Raises:
        QuantizationError: when the float model did not log the metric, or a cost is unknown.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        metric: str,
        costs: Sequence[str] = ("effective_bits",),
        constraints: Sequence[Constraint] = (),
        ladder: Ladder | None = None,
    ) -> None:
        faults = unknown_costs(costs)
        names = [*COSTS, *evaluator.float_metrics]
        faults += [
            f"constraint '{c}': there is no cost or logged metric {c.name!r}; valid: "
            f"{', '.join(names)}.{did_you_mean(c.name, names)}"
            for c in constraints
            if c.name not in names
        ]
        raise_all(QuantizationError, "cannot search", faults)
        self.evaluator = evaluator
        self.metric, self.costs, self.constraints = metric, tuple(costs), tuple(constraints)
        self.ladder = ladder
        #: What is evaluated, or was last; what a Ctrl-C ended.
        self.trial: Trial | None = None
        self.interrupted: Trial | None = None
        #: Called once a trial runs.
        self.begun: Callable[[], object] = lambda: None
        #: Called with each evaluated trial, its plan and what it scored.
        self.evaluated: Callable[[Trial, QuantPlan, Mapping[str, float]], object] = lambda trial, plan, metrics: None
        read(evaluator.float_metrics, metric)

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        self.begun()
        started = time.perf_counter()
        self.trial = trial
        noted: dict[str, Any] = {}
        try:
            space = self.evaluator.space
            assert space is not None
            params = space.suggest(trial)
            layer_plans = space.layer_plans(params)
            if PLAN not in trial.user_attrs:
                trial.set_user_attr(PLAN, as_plan(layer_plans, space.target).to_dict())
            costs = self.evaluator.costs(layer_plans)
            if (earlier := _same(trial.study.get_trials(deepcopy=False), params, trial.number)) is not None:
                noted[REPEATS] = earlier
                raise TrialPruned(f"the plan of trial {earlier}")
            if broken := self._check(trial, costs):
                raise TrialPruned(f"breaks {', '.join(broken)}")
            if self.ladder is None:
                metrics = self.evaluator.evaluate_layers(layer_plans).metrics | costs
            else:
                metrics = self.ladder.climb(trial, layer_plans, costs)
            values = tuple(read(metrics, name) for name in (self.metric, *self.costs))
            noted[METRICS] = metrics
            self._check(trial, metrics)
            self.evaluated(trial, as_plan(layer_plans, space.target), metrics)
        except TrialPruned:
            reached = trial.user_attrs.get(RUNGS)
            noted[METRICS] = reached[-1] if reached else costs
            if reached:
                # What it broke at the rung where it stopped tells the sampler more than nothing.
                self._check(trial, reached[-1])
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self.interrupted = trial
            noted[ERROR] = traceback.format_exc()
            raise
        finally:
            # Last, and few: each is a transaction of its own.
            for name, value in (noted | {SECONDS: time.perf_counter() - started}).items():
                trial.set_user_attr(name, value)
        return values

    def _check(self, trial: Trial, values: Mapping[str, float]) -> list[str]:
        """Notes by how much each constraint on `values` is kept; returns those that are broken."""
        known = trial.study.get_trials(deepcopy=False)[trial.number].constraints if self.constraints else {}
        excess = {str(c): c.violation(values) for c in self.constraints if c.name in values}
        for constraint in excess.keys() - known.keys():
            trial.set_constraint(constraint, excess[constraint])
        return [constraint for constraint, value in excess.items() if value > 0]


def held_back(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Returns those of these trials that stopped below the top rung."""
    return [
        trial
        for trial in trials
        if trial.state == TrialState.PRUNED and reached_by(trial) and REPEATS not in trial.user_attrs
    ]


def _same(trials: Iterable[FrozenTrial], params: Mapping[str, Any], before: int) -> int | None:
    """Returns the number of the earliest trial with the same parameters that is evaluated or will be."""
    same = [trial for trial in trials if trial.number < before and trial.params == params]
    return next((trial.number for trial in same if trial.state in _TAKEN or held_back([trial])), None)
