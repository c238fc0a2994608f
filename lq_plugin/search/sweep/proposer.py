"""Chooses the parameters that a sweep tries next, and puts each trial whole into the study's queue."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from lq_plugin.errors import QuantizationError, did_you_mean, raise_all
from lq_plugin.search.shared.database import quiet

#: Proposals in a row that may be known before any other combination is taken.
_REPEATS = 10
#: The largest space whose combinations are counted.
_COUNTABLE = 10_000


class SweepProposer:
    """Samples on a copy of the study in memory, and publishes trials whose numbers have no gaps.

    Args:
        study: shared.
        sampler: what proposes.
        distributions: of all parameters.
        first: values of parameters to begin with; what they leave out is sampled.

    Raises:
        QuantizationError: listing each value of `first` that is impossible.
    """

    def __init__(
        self,
        study: Study,
        sampler: BaseSampler,
        distributions: Mapping[str, BaseDistribution],
        first: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.study, self.distributions = study, dict(distributions)
        self.first = [dict(values) for values in first]
        raise_all(
            QuantizationError,
            "hydra.sweeper.enqueue",
            [fault for values in self.first for fault in self._faults(values)],
        )
        with quiet():
            self._memory = optuna.create_study(directions=study.directions, sampler=sampler)
        #: Trials of the study, and the copies in memory of those that this process proposed.
        self._finished: set[int] = set()
        self._asked: dict[int, int] = {}

    def exhausted(self) -> bool:
        """Returns whether every combination has been tried or is in the queue."""
        return not self._untried(self.study.get_trials(deepcopy=False))

    def _untried(self, known: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
        """Returns the combinations that no trial has; `[{}]` where there are too many to count."""
        if (
            math.prod(len(values) if (values := _values(d)) else math.inf for d in self.distributions.values())
            > _COUNTABLE
        ):
            return [{}]
        taken = {_key(trial.params) for trial in known}
        grid = itertools.product(*(_values(d) or () for d in self.distributions.values()))
        combinations = [dict(zip(self.distributions, values, strict=True)) for values in grid]
        return [params for params in combinations if _key(params) not in taken]

    def publish(self) -> int:
        """Puts one more trial into the queue and returns its number; do not call it when `exhausted`."""
        with quiet():
            known = self._learn()
            seeds = [
                values for values in self.first if not any(values.items() <= trial.params.items() for trial in known)
            ]
            taken = {_key(trial.params) for trial in known}
            for _ in range(_REPEATS):
                trial = self._memory.ask(self.distributions)
                params = dict(trial.params) | (seeds[0] if seeds else {})
                if repeated := _key(params) in taken:
                    self._memory.tell(trial, state=TrialState.FAIL)
                else:
                    break
            if repeated:
                params = random.Random(len(known)).choice(self._untried(known)) or params
            # A genetic sampler keeps its generation there.
            attrs = self._memory.get_trials(deepcopy=False)[trial.number].system_attrs
            before = len(known)
            self.study.add_trial(
                create_trial(
                    state=TrialState.WAITING, params=params, distributions=self.distributions, system_attrs=dict(attrs)
                )
            )
            if params == trial.params and not repeated:
                self._asked[before] = trial.number
            elif not repeated:
                self._memory.tell(trial, state=TrialState.FAIL)
        return before

    def _learn(self) -> list[FrozenTrial]:
        """Adds finished trials to the copy; running ones run there also, so that a sampler can avoid them."""
        known = self.study.get_trials(deepcopy=False)
        for trial in known:
            if not trial.state.is_finished() or trial.number in self._finished:
                continue
            self._finished.add(trial.number)
            if (asked := self._asked.pop(trial.number, None)) is not None:
                self._memory.tell(asked, state=TrialState.FAIL)
            if trial.state != TrialState.FAIL and trial.params.keys() == self.distributions.keys():
                self._memory.add_trial(trial)
        return known

    def _faults(self, values: Mapping[str, Any]) -> list[str]:
        faults = []
        for name, value in values.items():
            if name not in self.distributions:
                faults.append(
                    f"no parameter {name!r}; valid: "
                    f"{', '.join(self.distributions)}.{did_you_mean(name, self.distributions)}"
                )
                continue
            try:
                possible = self.distributions[name]._contains(self.distributions[name].to_internal_repr(value))
            except ValueError:
                possible = False
            if not possible:
                faults.append(f"{name} cannot be {value!r}: {self.distributions[name]}")
        return faults


def _key(params: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset((name, repr(value)) for name, value in params.items())


def _values(distribution: BaseDistribution) -> list[Any]:
    """Returns all values of a parameter; none where they are not a finite set."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step:
        count = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + distribution.step * index for index in range(count + 1)]
    return []
