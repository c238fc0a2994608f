"""Samples plans in memory and publishes each whole.

Optuna writes one parameter after the other to a shared storage, a transaction each: with 60 layers that takes longer
than the evaluation. A trial that waits in the queue with all its parameters takes two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.shared.database import StudyError, quiet
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.search.space.model_space import ModelSpace, Params, as_plan
from lq_plugin.search.study.objective import METRICS, ORIGIN, PLAN, REPEATS
from lq_plugin.search.study.refine import Point, Refiner
from lq_plugin.search.surrogate.sampler import SurrogateSampler

#: Proposals in a row that may break a constraint before the search gives up.
_PATIENCE = 1000
#: Proposals in a row that may be known before random ones are tried, and before one is taken a second time.
_REPEATS, _RANDOM_REPEATS = 5, 30
#: One of so many proposals is the sampler's where there is a refiner: it looks where the additive model does not.
_SAMPLED = 4
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Proposer(BaseSampler):
    """Puts the proposals of a sampler into the study's queue.

    A `SurrogateSampler` reads the study itself. Any other works on a copy of it in memory, which takes up what all
    workers have found. A proposal that breaks a constraint on the cost becomes a pruned trial of the study, which the
    sampler learns from, and is never evaluated.

    It is also the shared study's own sampler: if another worker has taken what was published, the trial that Optuna
    then makes gets the values of a further proposal.

    Args:
        study: shared.
        sampler: what proposes.
        evaluator: calibrated; knows the space, and what a plan costs.
        constraints: only those on costs count here.
        refiner: makes most of the proposals, where the front has gaps that it can fill.
    """

    def __init__(
        self,
        study: Study,
        sampler: BaseSampler,
        evaluator: Evaluator,
        constraints: Iterable[Constraint] = (),
        refiner: Refiner | None = None,
    ) -> None:
        assert evaluator.space is not None
        self.study, self.evaluator, self.space = study, evaluator, evaluator.space
        costs = evaluator.costs({})
        self.constraints = [constraint for constraint in constraints if constraint.name in costs]
        self._surrogate = sampler if isinstance(sampler, SurrogateSampler) else None
        with quiet():
            self._memory = optuna.create_study(directions=study.directions, sampler=sampler)
        self._seen: set[int] = set()
        self._params: Params = {}
        self._refiner = refiner
        self._asked = 0
        #: Gives what trials score on average that were scored again, by number.
        self.means: Callable[[], Mapping[int, float]] = dict

    def publish(self) -> bool:
        """Puts one more plan into the queue; returns False where the sampler knows that there is no new one.

        Raises:
            StudyError: the constraints leave hardly any plan.
        """
        for _ in range(_PATIENCE):
            trial = self._propose()
            if trial is None:
                self._check_any()
                return False
            self.study.add_trial(trial)
            if trial.state == TrialState.WAITING:
                return True
        names = " and ".join(map(str, self.constraints))
        raise StudyError(
            f"{_PATIENCE} proposals in a row broke {names}; widen the space towards fewer bits, or the constraint"
        )

    def _check_any(self) -> None:
        """Refuses constraints that no plan of the study has kept."""
        if all(trial.state == TrialState.PRUNED for trial in self.study.get_trials(deepcopy=False)):
            names = " and ".join(map(str, self.constraints))
            raise StudyError(f"no plan found that keeps {names}; widen the space, or the constraint")

    def _propose(self) -> FrozenTrial | None:
        """Returns a proposal that no worker has yet, as far as the sampler finds one; None if it says there is none."""
        if self._surrogate is not None:
            new = self._surrogate.propose(self.study)
            if new is None:
                return None
            return waiting_trial(self.space, new, self.evaluator, self.constraints)
        taken = set()
        for known in self.study.get_trials(deepcopy=False):
            taken.add(frozenset(known.params.items()))
            if known.state in _FINISHED and known.number not in self._seen and REPEATS not in known.user_attrs:
                self._seen.add(known.number)
                self._memory.add_trial(known)
        self._asked += 1
        if self._refiner is not None and self._asked % _SAMPLED:
            between = self._refiner.propose(self._points(), taken)
            if between is not None:
                return waiting_trial(self.space, between, self.evaluator, self.constraints, {ORIGIN: "refined"})
        sampler = self._memory.sampler
        try:
            for repeats in range(_RANDOM_REPEATS):
                if repeats == _REPEATS:
                    self._memory.sampler = RandomSampler(seed=len(taken))
                trial = self._memory.ask()
                params = dict(self.space.suggest(trial))
                # What it scores comes back from the shared study.
                self._memory.tell(trial, state=TrialState.FAIL)
                if frozenset(params.items()) not in taken:
                    break
        finally:
            self._memory.sampler = sampler
        attrs = self._memory.get_trials(deepcopy=False)[trial.number].system_attrs
        return waiting_trial(self.space, params, self.evaluator, self.constraints, system_attrs=attrs)

    def _points(self) -> list[Point]:
        """Returns the complete trials of a study with two objectives."""
        sign = 1.0 if self.study.directions[0] == StudyDirection.MAXIMIZE else -1.0
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        again = self.means()
        return [
            Point(sign * again.get(trial.number, trial.values[0]), trial.values[1], trial.params)
            for trial in complete
            if all(map(math.isfinite, trial.values))
        ]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> Params:
        return {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._params = {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if not self._params:
            proposed = self._propose()
            if proposed is not None:
                self._params = dict(proposed.params)
            else:
                # Another worker has taken the last plan; this trial is pruned, as one that repeats another's.
                assert self._surrogate is not None
                self._params = self._surrogate.repeated(study)
        return self._params[param_name]


def waiting_trial(
    space: ModelSpace,
    params: Mapping[str, Any],
    evaluator: Evaluator,
    constraints: Iterable[Constraint] = (),
    user_attrs: Mapping[str, Any] | None = None,
    system_attrs: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """Returns a trial for the queue, with its plan; it is pruned already where the plan's cost breaks a constraint.

    Args:
        space: of the study.
        params: values of its parameters.
        evaluator: calibrated; it knows the costs.
        constraints: of the search; those on costs count.
        user_attrs, system_attrs: further attributes of the trial.
    """
    layer_plans = space.layer_plans(params)
    costs = evaluator.costs(layer_plans)
    excess = {str(constraint): constraint.violation(costs) for constraint in constraints if constraint.name in costs}
    kept = all(value <= 0 for value in excess.values())
    attrs = {PLAN: as_plan(layer_plans, space.target).to_dict(), **(user_attrs or {})}
    return create_trial(
        state=TrialState.WAITING if kept else TrialState.PRUNED,
        params=dict(params),
        distributions=dict(space.distributions),
        user_attrs=attrs if kept else attrs | {METRICS: costs},
        system_attrs=dict(system_attrs or {}),
        constraints=excess,
    )
