"""An Optuna sampler that looks for the front with a surrogate of the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from lq_plugin.errors import QuantizationError
from lq_plugin.search.space.model_space import Params
from lq_plugin.search.surrogate.candidates import around, near, solved
from lq_plugin.search.surrogate.improvement import Front
from lq_plugin.search.surrogate.problem import PRICED, Problem
from lq_plugin.search.surrogate.regression import Floats, Ints, Prior, Regression, likeliest
from lq_plugin.search.surrogate.transform import PLAIN, TRANSFORMS, Transform

#: Finished trials before there is a surrogate.
_FIRST = 4
#: The prior is chosen anew when there are so many times more trials.
_GROWTH = 1.15
#: Draws of random plans, and how often so many are drawn for a new one.
_DRAWS, _ROUNDS = 200, 20
#: The largest cost that counts lies so far beyond that of the space, as a share of its span.
_BEYOND = 0.02
#: The linear algebra of NumPy and SciPy, both imported above.
_BLAS = ThreadpoolController()


@dataclass(frozen=True)
class _Trials:
    """Finished trials as arrays."""

    plans: Ints
    values: Floats
    costs: Floats
    #: By how much each constraint that is no cost is broken, by name.
    excess: dict[str, Floats]
    pending: Ints

    @property
    def feasible(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        kept = np.ones(len(self.plans), dtype=bool)
        for values in self.excess.values():
            kept &= values <= 0
        return kept


class SurrogateSampler(BaseSampler):
    """Proposes the plan that is expected to add most to the front, by a regression over all finished trials.

    `lq_plugin.search.surrogate.regression` predicts a plan's metric and how uncertain that is, its costs are known;
    `improvement` has the expected hypervolume improvement, on a logarithmic scale of the costs. In a space that is
    small enough to be predicted whole every second proposal is the plan that most probably is on the front, so that
    points of little volume are found as well. Plans that other workers evaluate count as if they scored what is
    predicted. Nothing is kept but what the study's storage has: any number of workers may share it, and a study goes on
    as if it had never stopped.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._problem: Problem | None = None
        self._independent = RandomSampler(seed=self.seed)
        self._fitted: tuple[int, Transform, Prior] | None = None

    def attach(self, problem: Problem) -> None:
        """Tells the sampler what it samples for; a search does it."""
        self._problem, self._fitted = problem, None

    @property
    def problem(self) -> Problem:
        """The problem that `attach` told.

        Raises:
            QuantizationError: before that.
        """
        if self._problem is None:
            raise QuantizationError(
                "a SurrogateSampler knows costs and sensitivities: it is for lq_plugin.search.search and lq-search; "
                "elsewhere call attach(Problem(space, sensitivity, costs)) first"
            )
        return self._problem

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.problem.space.distributions)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> Params:
        return self.propose(study, trial.number) or self.repeated(study)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Takes another seed."""
        self.seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._independent.reseed_rng()

    def repeated(self, study: Study) -> Params:
        """Returns any plan's parameters, for a trial that needs some where `propose` finds no new plan."""
        rng = np.random.default_rng([self.seed, len(study.get_trials(deepcopy=False))])
        return self.problem.params(rng.integers(0, self.problem.sizes))

    def propose(self, study: Study, asking: int | None = None) -> Params | None:
        """Returns the parameters of a plan that no trial of the study has and that keeps all limits on its costs.

        None where there is no such plan; in a space too large to look at all plans, where many draws find none.

        Args:
            study: with all that is known.
            asking: number of a trial that runs already and whose plan this will be.
        """
        problem = self.problem
        trials = study.get_trials(deepcopy=False)
        names = problem.space.distributions.keys()
        known = [t for t in trials if t.number != asking and names <= t.params.keys()]
        taken = {problem.indices(trial.params) for trial in known}
        rng = np.random.default_rng([self.seed, len(known)])
        done = self._read(study, known)
        if len(done.plans) < _FIRST or np.ptp(done.values) == 0:
            found = self._random(rng, taken)
        else:
            # Matrices of some hundred rows: threads that wait for each other on a busy machine take ten times as long.
            with _BLAS.limit(limits=1, user_api="blas"):
                found = self._best(study, done, taken, rng)
        return problem.params(found) if found is not None else None

    def _read(self, study: Study, trials: Sequence[FrozenTrial]) -> _Trials:
        problem = self.problem
        number = 1 + len(problem.costs)
        complete = [
            t
            for t in trials
            if t.state == TrialState.COMPLETE and len(t.values) == number and all(map(math.isfinite, t.values))
        ]
        waiting = [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
        names = {name for t in complete for name in t.constraints} - problem.known
        values = np.array([t.values for t in complete], dtype=np.float64).reshape(-1, number)
        again = problem.means()
        values[:, 0] = [again.get(t.number, score) for t, score in zip(complete, values[:, 0].tolist(), strict=True)]
        return _Trials(
            _plans(problem, complete),
            values[:, 0],
            values[:, 1:],
            {name: np.array([t.constraints.get(name, 0.0) for t in complete]) for name in sorted(names)},
            _plans(problem, waiting),
        )

    def _random(self, rng: np.random.Generator, taken: set[tuple[int, ...]]) -> Ints | None:
        """Returns a new plan that keeps the limits; None where there is none, or many draws find none."""
        problem = self.problem
        if problem.everything is not None:
            pool = self._new(problem.everything, taken)
            pool = problem.first_kept(rng.permutation(pool)) if problem.inexact else pool
            return np.asarray(pool[rng.integers(len(pool))], dtype=np.int64) if len(pool) else None
        limited = [*problem.limits, *problem.inexact.values()]
        for share in np.linspace(0, 1, _ROUNDS):
            drawn = rng.integers(0, problem.sizes, size=(_DRAWS, len(problem.sizes)))
            if limited:
                # A tight limit leaves few plans: ever more units get the choice that is safest for one of the limits.
                limit = limited[int(rng.integers(len(limited)))]
                safest = [int((t if math.isfinite(limit.most) else -t).argmin()) for t in limit.tables]
                drawn = np.where(rng.random(drawn.shape) < share, safest, drawn)
            pool = problem.first_kept(self._new(drawn, taken))
            if len(pool):
                return _first(pool)
        return None

    def _new(self, plans: Ints, taken: set[tuple[int, ...]]) -> Ints:
        """Returns the allowed ones of some plans, each once and none that is taken."""
        fresh = {key: row for row, plan in enumerate(plans.tolist()) if (key := tuple(plan)) not in taken}
        found: Ints = plans[list(fresh.values())]
        found = found[self.problem.allowed(found)]
        return found

    def _best(self, study: Study, done: _Trials, taken: set[tuple[int, ...]], rng: np.random.Generator) -> Ints | None:
        problem, features = self.problem, self.problem.features
        sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
        transform, prior = self._fit(done, sign)
        targets = sign * transform.apply(done.values)
        model = Regression(features, done.plans, targets, prior)
        if len(done.pending):
            # What others evaluate, as if it scored what is predicted: the next plan lies elsewhere.
            expected, _ = model.predict(done.pending)
            plans = np.concatenate([done.plans, done.pending])
            model = Regression(features, plans, np.concatenate([targets, expected]), prior)
        limits = [
            Regression(features, done.plans, excess, Prior())
            for excess in done.excess.values()
            if (excess > 0).any() and np.ptp(excess) > 0
        ]
        kept = done.feasible
        front = self._front(targets[kept], done.costs[kept], float(targets.min() - 0.1 * targets.std()))
        by_probability = problem.everything is not None and len(taken) % 2 == 1

        adds_up = np.allclose(problem.prices(done.plans), done.costs, rtol=1e-6)

        def gains(plans: Ints, costs: Floats) -> Floats:
            mean, deviation = model.predict(plans)
            # Of what a trial will show, its luck included.
            deviation = np.hypot(deviation, model.noise)
            gain = (front.probability if by_probability else front.improvement)(mean, deviation, _logs(costs))
            for limit in limits:
                excess, spread = limit.predict(plans)
                gain = gain * ndtr(-excess / np.hypot(spread, limit.noise))
            return gain

        def best_of(plans: Ints) -> Ints | None:
            gain = gains(plans, problem.prices(plans))
            plans = problem.first_kept(plans[np.argsort(-gain, kind="stable")])
            if not len(plans) or adds_up or problem.exact is None:
                return _first(plans)
            plans = plans[:PRICED]
            found: Ints = plans[int(gains(plans, problem.exact_prices(plans)).argmax())]
            return found

        if problem.everything is not None:
            return best_of(self._new(problem.everything, taken))
        shown = _nondominated(targets, done.costs, kept)
        best = best_of(self._new(self._large(done, shown, model, rng), taken))
        if best is None:
            return self._random(rng, taken)
        # From there on uphill, once: two changes away from a front is not far in a large space.
        further = np.concatenate([near(best, problem.sizes, rng), best[None]])
        return best_of(self._new(further, taken))

    def _large(self, done: _Trials, shown: Ints, model: Regression, rng: np.random.Generator) -> Ints:
        """Returns candidates of a space that is too large to look at all plans."""
        problem = self.problem
        front = done.plans[shown] if len(shown) else done.plans
        pool = [around(front, problem.sizes, rng)]
        # The sums of costs that do not add up show a direction only.
        unlimited = [replace(limit, most=np.inf, least=-np.inf) for limit in problem.inexact.values()]
        prices = problem.costs or problem.limits or unlimited
        if prices:
            price = prices[int(rng.integers(len(prices)))]
            start = front[int(rng.integers(len(front)))]
            ends = np.sort(price.of(front))
            here = int(np.searchsorted(ends, price.of(start[None])[0]))
            low, high = ends[max(here - 1, 0)], ends[min(here + 1, len(ends) - 1)]
            budget = float(low + rng.random() * (high - low))
            pool.append(solved(start, model.predict, price, budget, problem.limits, rng))
        return np.concatenate(pool)

    def _front(self, targets: Floats, costs: Floats, worst: float) -> Front:
        problem = self.problem
        most = []
        for i, (price, high) in enumerate(zip(problem.costs, problem.most.tolist(), strict=True)):
            high = max(high, float(costs[:, i].max(initial=0.0)))
            low = price.base + sum(float(table.min()) for table in price.tables)
            low = max(low, 1e-3 * high)
            ends = _logs(np.array([[low], [high]]))[:, 0]
            most.append(float(ends[1] + _BEYOND * (ends[1] - ends[0])))
        return Front(targets, _logs(costs), worst, np.array(most))

    def _fit(self, done: _Trials, sign: float) -> tuple[Transform, Prior]:
        """Returns transform and prior by marginal likelihood, of the first trials at certain numbers of them."""
        number = _FIRST
        while (further := math.ceil(number * _GROWTH)) <= len(done.plans):
            number = further
        # A later value may be none of the transform's, such as a loss of 0 after logarithms.
        if self._fitted is None or self._fitted[0] != number or not self._fitted[1].fits(done.values):
            plans, values = done.plans[:number], done.values[:number]
            found = []
            for transform in TRANSFORMS:
                if transform.fits(done.values) and np.ptp(targets := sign * transform.apply(values)) > 0:
                    prior = likeliest(self.problem.features, plans, targets)
                    model = Regression(self.problem.features, plans, targets, prior)
                    # The density of the values themselves.
                    found.append((model.evidence + float(transform.log_slope(values).sum()), transform, prior))
            if not found:  # these tie, later ones do not
                return PLAIN, Prior()
            _, best, chosen = max(found, key=lambda entry: entry[0])
            self._fitted = number, best, chosen
        return self._fitted[1:]


def _first(plans: Ints) -> Ints | None:
    return np.asarray(plans[0], dtype=np.int64) if len(plans) else None


def _plans(problem: Problem, trials: Sequence[FrozenTrial]) -> Ints:
    rows = [problem.indices(trial.params) for trial in trials]
    return np.array(rows, dtype=np.int64).reshape(-1, len(problem.units))


def _logs(costs: Floats) -> Floats:
    """Returns logarithms of costs: half the size is as much worth everywhere. Costs are positive."""
    return np.log(np.maximum(costs, 1e-300))


def _nondominated(targets: Floats, costs: Floats, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> Ints:
    """Returns the trials that no other one is better than in the metric and all costs."""
    rows = np.flatnonzero(kept)
    losses = np.column_stack([-targets, costs])[rows]
    no_worse = np.ones((len(rows), len(rows)), dtype=bool)
    equal = no_worse.copy()
    for column in losses.T:
        no_worse &= column[None] <= column[:, None]
        equal &= column[None] == column[:, None]
    return np.asarray(rows[~(no_worse & ~equal).any(1)], dtype=np.int64)
