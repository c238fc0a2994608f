"""The surrogate's posterior, its improvement and its proposals, against explicit features, draws and enumeration."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna._hypervolume import compute_hypervolume
from optuna.trial import TrialState, create_trial
from scipy.stats import multivariate_normal
from threadpoolctl import threadpool_info, threadpool_limits

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.search import Problem, SurrogateSampler, search as run
from lq_plugin.search.shared.database import quiet
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.search.space.model_space import ModelSpace, Unit
from lq_plugin.search.surrogate.candidates import Price, cheapest_harm, everything, steps, swaps
from lq_plugin.search.surrogate.improvement import Front
from lq_plugin.search.surrogate.regression import Features, Prior, Regression, likeliest

from .conftest import CPU

BITS = (2, 3, 4, 8)
CHOICES = tuple(QuantSpec.parse(f"int{bits} {how}") for how in ("per_channel mse", "per_tensor") for bits in BITS)


def make_space(units: int) -> ModelSpace:
    named = [Unit(f"layer{i}.weight", "weight", (f"layer{i}",), CHOICES) for i in range(units)]
    return ModelSpace(tuple(named), ())


class World:
    """A space whose plans' accuracy and size are known: additive harm with cross terms, squashed to a share."""

    def __init__(self, units: int, seed: int = 0) -> None:
        self.space, rng = make_space(units), np.random.default_rng(seed)
        bits = np.array([c.bit_width for c in CHOICES], dtype=float)
        channels = np.array(["channel" in str(c) for c in CHOICES])
        self.harm = [
            rng.lognormal(0, 1) * 4.0**-bits * np.where(channels, 1, rng.uniform(0.8, 5)) for _ in range(units)
        ]
        self.true = [row * rng.lognormal(0, 0.4, len(row)) for row in self.harm]
        self.cross = rng.uniform(-0.3, 0.5, (units, units, 8, 8))
        self.sizes = rng.uniform(1, 10, units)
        self.price = [size / self.sizes.sum() * (bits + 0.2 * channels) for size in self.sizes]
        self.base = sum(float(row[0]) for row in self.price)

    @property
    def tables(self) -> tuple[float, dict[str, dict[str, float]]]:
        rows = {
            u.name: dict(zip(map(str, CHOICES), row - row[0], strict=True))
            for u, row in zip(self.space.units, self.price, strict=True)
        }
        return self.base, rows

    @property
    def sensitivity(self) -> dict[str, dict[str, float]]:
        return {
            u.name: dict(zip(map(str, CHOICES), row, strict=True))
            for u, row in zip(self.space.units, self.harm, strict=True)
        }

    def problem(self, costs: int = 1, limits: tuple[str, ...] = ()) -> Problem:
        bounded = [(Constraint.parse(text), *self.tables) for text in limits]
        return Problem(self.space, self.sensitivity, [self.tables] * costs, bounded)

    def score(self, plan: tuple[int, ...]) -> tuple[float, float]:
        """Accuracy and size."""
        harm = sum(float(self.true[u][c]) for u, c in enumerate(plan))
        for (u, c), (v, d) in combinations(enumerate(plan), 2):
            harm += 2 * self.cross[u, v, c, d] * float(np.sqrt(self.true[u][c] * self.true[v][d]))
        return round(0.1 + 0.8 / (1 + 8 * max(harm, 0.0)), 3), sum(
            float(row[c]) for row, c in zip(self.price, plan, strict=True)
        )


def tell(
    study: optuna.Study, problem: Problem, params: dict[str, Any], values: list[float] | None, **more: Any
) -> None:
    state = TrialState.WAITING if values is None else TrialState.COMPLETE
    study.add_trial(
        create_trial(state=state, params=params, distributions=problem.space.distributions, values=values, **more)
    )


def in_memory(*directions: str, storage: Any = None) -> optuna.Study:
    with quiet():
        return optuna.create_study(directions=list(directions or ("maximize", "minimize")), storage=storage)


def propose(sampler: SurrogateSampler, study: optuna.Study) -> dict[str, Any]:
    params = sampler.propose(study)
    assert params is not None, "there is a new plan"
    return dict(params)


def search(
    world: World, n_trials: int, seed: int = 0, problem: Problem | None = None, costs: int = 1
) -> list[tuple[int, ...]]:
    """Plans in the order in which they are proposed."""
    problem = problem or world.problem(costs)
    sampler, study = SurrogateSampler(seed), in_memory("maximize", *["minimize"] * costs)
    sampler.attach(problem)
    found = []
    for _ in range(n_trials):
        params = propose(sampler, study)
        plan = problem.indices(params)
        accuracy, size = world.score(plan)
        tell(study, problem, params, [accuracy, *[size] * costs])
        found.append(plan)
    return found


def front_of(points: list[tuple[float, float]]) -> set[tuple[float, float]]:
    return {p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)}


def volume(points: list[tuple[float, float]]) -> float:
    losses = np.array([(-accuracy, size) for accuracy, size in points])
    return float(compute_hypervolume(losses, np.array([-0.1, 9.0])))


@pytest.mark.parametrize(
    "prior", [Prior(), Prior(single=1.0, share=0.0, pair=0.0), Prior(0.2, 0.7, 1.5, 0.3, 1.0, 0.6)]
)
def test_the_posterior_is_that_of_explicit_weights(prior: Prior) -> None:
    rng = np.random.default_rng(0)
    harms = [rng.lognormal(0, 2, size) for size in (3, 2, 4)]
    plans = rng.integers(0, (3, 2, 4), (12, 3))
    new = rng.integers(0, (3, 2, 4), (9, 3))
    targets = rng.normal(2.0, 3.0, 12)
    # One column for each weight, and the weights' covariance, from the definition.
    alike = []
    for row in harms:
        logs = np.log(row)
        close = np.exp(-0.5 * ((logs[:, None] - logs) / prior.length) ** 2)
        alike.append((1 - prior.own) * close + prior.own * np.eye(len(row)))
    weights = [("β0",), ("β1",)]
    weights += [(kind, u, c) for kind in "αθ" for u, row in enumerate(harms) for c in range(len(row))]
    weights += [
        ("ρ", u, c, v, d)
        for u, v in combinations(range(3), 2)
        for c, d in product(range(len(harms[u])), range(len(harms[v])))
    ]
    deviation = {"α": prior.single / np.sqrt(3), "θ": prior.share, "ρ": prior.pair}

    def covariance(a: Any, b: Any) -> float:
        if a[0] != b[0] or a[1::2] != b[1::2]:
            return 0.0
        if a[0].startswith("β"):
            return 100.0
        return deviation[a[0]] ** 2 * np.prod(
            [alike[u][c, d] for u, c, d in zip(a[1::2], a[2::2], b[2::2], strict=True)]
        )

    def columns(plan: np.ndarray) -> list[float]:
        each = [harms[u][c] for u, c in enumerate(plan)]
        shares = np.array(each) / sum(each)
        found = []
        for kind, *where in weights:
            if kind.startswith("β"):
                found.append(1.0 if kind == "β0" else np.log(sum(each)))
                continue
            chosen = all(plan[u] == c for u, c in zip(where[::2], where[1::2], strict=True))
            size = {"α": 1.0, "θ": shares[where[0]], "ρ": 2 * np.sqrt(np.prod(shares[where[::2]]))}[kind]
            found.append(size if chosen else 0.0)
        return found

    before = np.array([[covariance(a, b) for b in weights] for a in weights])
    seen, unseen = (np.array([columns(plan) for plan in rows]) for rows in (plans, new))
    center, scale = targets.mean(), targets.std()
    noise = prior.noise**2 + 1e-8
    # Equations 2.8 and 2.9 of Rasmussen and Williams in the form that needs no inverse of the prior's covariance.
    gain = before @ seen.T @ np.linalg.inv(seen @ before @ seen.T + noise * np.eye(12))
    mean = gain @ ((targets - center) / scale)
    after = before - gain @ seen @ before
    found = Regression(Features(harms), plans, targets, prior)
    got, spread = found.predict(new)
    np.testing.assert_allclose(got, center + scale * (unseen @ mean), rtol=1e-4)
    np.testing.assert_allclose(spread, scale * np.sqrt(np.diag(unseen @ after @ unseen.T)), rtol=1e-3)
    marginal = multivariate_normal(np.full(12, center), scale**2 * (seen @ before @ seen.T + noise * np.eye(12)))
    assert found.evidence == pytest.approx(marginal.logpdf(targets), rel=1e-6)


def test_the_likeliest_prior_has_the_largest_evidence_of_those_near_it() -> None:
    world = World(4)
    rng = np.random.default_rng(1)
    plans = rng.integers(0, 8, (60, 4))
    targets = np.log(np.array([world.score(tuple(plan))[0] for plan in plans.tolist()]))
    features = Features(world.harm)
    best = likeliest(features, plans, targets)
    evidence = Regression(features, plans, targets, best).evidence
    assert best.pair > 0, "the cross terms are seen"
    for other in (Prior(), Prior(single=1.0), Prior(pair=0.0), Prior(noise=0.4), Prior(share=0.0)):
        assert evidence >= Regression(features, plans, targets, other).evidence


def test_it_predicts_plans_that_it_has_not_seen_better_than_the_sensitivities_alone() -> None:
    world = World(4, seed=3)
    rng = np.random.default_rng(2)
    plans = rng.integers(0, 8, (160, 4))
    accuracy = np.array([world.score(tuple(plan))[0] for plan in plans.tolist()])
    targets = np.log(accuracy / (1 - accuracy))
    features = Features(world.harm)
    model = Regression(features, plans[:80], targets[:80], likeliest(features, plans[:80], targets[:80]))
    mean, deviation = model.predict(plans[80:])
    harm = np.log(sum(world.harm[u][plans[:, u]] for u in range(4)))
    law = np.polyval(np.polyfit(harm[:80], targets[:80], 2), harm[80:])
    assert np.mean((mean - targets[80:]) ** 2) < 0.25 * np.mean((law - targets[80:]) ** 2)
    inside = np.abs(mean - targets[80:]) < 2 * np.hypot(deviation, model.noise)
    assert 0.85 < inside.mean() <= 1.0, "the uncertainty is honest"


@pytest.mark.parametrize("costs", [0, 1, 2])
def test_the_improvement_is_the_mean_over_draws(costs: int) -> None:
    rng = np.random.default_rng(costs)
    metric, price = rng.random(7), rng.random((7, costs))
    mean, deviation, new = rng.random(5), rng.uniform(0.05, 0.5, 5), rng.random((5, costs))
    worst, most = -0.2, np.full(costs, 1.1)
    got = Front(metric, price, worst, most).improvement(mean, deviation, new)
    reference = np.concatenate([[-worst], most])

    def hypervolume(scores: np.ndarray, sizes: np.ndarray) -> float:
        losses = np.column_stack([-scores, sizes])
        losses = losses[(losses < reference).all(1)]
        return float(compute_hypervolume(losses, reference)) if len(losses) else 0.0

    before = hypervolume(metric, price)
    for plan in range(5):
        drawn = rng.normal(mean[plan], deviation[plan], 2000)
        gains = [
            hypervolume(np.append(metric, score), np.vstack([price, new[plan]])) - before if score > worst else 0.0
            for score in drawn
        ]
        assert got[plan] == pytest.approx(np.mean(gains), abs=4 * np.std(gains) / np.sqrt(2000) + 1e-6)


def test_the_probability_is_that_of_beating_all_that_cost_no_more() -> None:
    front = Front(np.array([0.5, 0.9]), np.array([[2.0], [4.0]]), 0.0, np.array([8.0]))
    assert front.height(np.array([[1.0], [2.0], [3.9], [4.0], [7.0]])).tolist() == [0.0, 0.5, 0.5, 0.9, 0.9]
    got = front.probability(np.array([0.5, 0.9, 1.0]), np.full(3, 0.1), np.array([[3.0], [4.0], [5.0]]))
    np.testing.assert_allclose(got, [0.5, 0.5, 0.8413447], rtol=1e-6)


def test_the_integer_program_finds_what_enumeration_finds() -> None:
    rng = np.random.default_rng(0)
    sizes = (3, 4, 2, 5)
    harms, tables, others = ([rng.random(size) for size in sizes] for _ in range(3))
    price, other = Price(1.0, tables), Price(0.0, others, most=2.0)
    plans = everything(sizes)
    assert plans is not None
    assert len(plans) == 120
    harm = sum(row[plans[:, unit]] for unit, row in enumerate(harms))
    for budget in (2.0, 2.5, 3.0, 4.0):
        fits = (price.of(plans) <= budget) & other.keeps(plans)
        found = cheapest_harm(harms, price, budget, [other])
        if not fits.any():
            assert found is None
            continue
        assert found is not None
        assert price.of(found[None])[0] <= budget + 1e-6
        assert sum(row[c] for row, c in zip(harms, found, strict=True)) == pytest.approx(harm[fits].min(), rel=2e-3)
    assert cheapest_harm(harms, price, 0.0) is None


def test_neighbours_are_one_to_three_units_away() -> None:
    plan = np.array([0, 1, 2, 0])
    near = steps(plan, (3, 4, 3, 2))
    assert len(np.unique(near, axis=0)) == len(near) == 2 + 3 + 2 + 1
    assert set((near != plan).sum(1)) == {1}
    further = swaps(plan, (3, 4, 3, 2), np.random.default_rng(0), 200)
    assert set((further != plan).sum(1)) <= {0, 1, 2, 3}
    assert (further < (3, 4, 3, 2)).all()
    assert everything([8] * 10) is None


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_front_of_an_enumerable_space(seed: int) -> None:
    world = World(3, seed)
    every = {plan: world.score(plan) for plan in product(range(8), repeat=3)}
    front = front_of(list(every.values()))
    found = [every[plan] for plan in search(world, 100, seed)]
    assert len(set(found[:40]) & front) >= 0.4 * len(front)
    assert len(set(found) & front) >= 0.8 * len(front)
    assert volume(found) >= 0.995 * volume(list(every.values()))


@pytest.mark.slow
def test_it_goes_far_ahead_of_random_plans_in_a_large_space() -> None:
    world = World(24)
    found = search(world, 50)
    assert len(set(found)) == 50
    rng = np.random.default_rng(0)
    drawn = [tuple(plan) for plan in rng.integers(0, 8, (500, 24)).tolist()]
    assert volume([world.score(plan) for plan in found]) > 1.3 * volume([world.score(plan) for plan in drawn])


def test_a_seed_repeats_and_a_study_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    world = World(8)
    problem = world.problem()
    whole = search(world, 16, seed=4, problem=problem)
    assert search(world, 16, seed=4, problem=problem) == whole
    assert search(world, 16, seed=5, problem=problem) != whole
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = in_memory(storage=url)
    for number in range(16):
        if number % 6 == 0:
            # As after a stop: another process, which knows the storage only.
            study = optuna.load_study(study_name=study.study_name, storage=url)
            sampler = SurrogateSampler(seed=4)
            sampler.attach(problem)
        params = propose(sampler, study)
        assert problem.indices(params) == whole[number]
        tell(study, problem, params, list(world.score(whole[number])))


def test_what_others_evaluate_is_not_proposed_again() -> None:
    world = World(3)
    problem, study = world.problem(), in_memory()
    workers = [SurrogateSampler(seed=seed) for seed in range(3)]
    for plan in search(world, 20):
        tell(study, problem, problem.params(plan), list(world.score(plan)))
    for worker in workers * 8:
        worker.attach(problem)
        tell(study, problem, propose(worker, study), None)
    waiting = [problem.indices(t.params) for t in study.get_trials(states=(TrialState.WAITING,))]
    assert len(set(waiting)) == 24
    # They spread: no two thirds of them at one end of the sizes.
    sizes = np.sort([world.score(plan)[1] for plan in waiting])
    assert sizes[-1] - sizes[0] > 1.0


@pytest.mark.parametrize("units", [3, 20])
def test_bounds_on_costs_are_kept(units: int) -> None:
    world = World(units)
    problem = world.problem(limits=("size <= 4", "size >= 2.5"))
    found = [world.score(plan)[1] for plan in search(world, 25, problem=problem)]
    assert max(found) <= 4 + 1e-9
    # In a large space the first plans are random.
    assert np.mean(np.array(found) >= 2.5 - 1e-9) > 0.9


def test_bounds_on_metrics_are_learned() -> None:
    world = World(3)
    problem = world.problem()
    study, sampler = in_memory(), SurrogateSampler(0)
    sampler.attach(problem)
    kept = []
    for _ in range(60):
        params = propose(sampler, study)
        accuracy, size = world.score(problem.indices(params))
        tell(study, problem, params, [accuracy, size], constraints={"accuracy >= 0.7": 0.7 - accuracy})
        kept.append(accuracy >= 0.7)
    assert np.mean(kept[20:]) > 0.6
    assert np.mean(kept[20:]) > np.mean([world.score(p)[0] >= 0.7 for p in product(range(8), repeat=3)]) + 0.1


@pytest.mark.parametrize(
    "directions", [["maximize"], ["minimize"], ["minimize", "minimize"], ["maximize"] + ["minimize"] * 2]
)
def test_one_objective_and_several_costs(directions: list[str]) -> None:
    world = World(3)
    costs = len(directions) - 1
    base, table = world.tables
    scaled = [
        (base * i, {name: {c: i * more for c, more in row.items()} for name, row in table.items()})
        for i in range(1, costs + 1)
    ]
    problem = Problem(world.space, world.sensitivity, scaled)
    study, sampler = in_memory(*directions), SurrogateSampler(0)
    sampler.attach(problem)
    sign = 1 if directions[0] == "maximize" else -1
    every = [world.score(plan) for plan in product(range(8), repeat=3)]
    found = []
    for _ in range(30):
        params = propose(sampler, study)
        accuracy, size = world.score(problem.indices(params))
        # A loss is no share: between 1 and 8.
        value = accuracy if sign > 0 else 8 - 8 * accuracy
        tell(study, problem, params, [value, *[size * (1 + i) for i in range(costs)]])
        found.append((accuracy, size))
    if costs:
        assert volume(found) >= 0.94 * volume(every)
    else:
        assert max(found)[0] >= max(every)[0] - 0.005


def test_costs_that_do_not_add_up_are_priced_one_by_one() -> None:
    """The size is a product over two groups of units, of which the tables know the changes from the first plan only."""
    world = World(3)
    table = {u.name: {str(c): 60.0 * (c.bit_width / 2 - 1) for c in CHOICES} for u in world.space.units}

    def product_of(params: dict[str, Any]) -> list[float]:
        bits = [unit.choice(params).bit_width for unit in world.space.units]  # type: ignore[union-attr]
        return [float(np.prod(bits))]

    problem = Problem(world.space, world.sensitivity, [(8.0, table)], (), product_of)
    study, sampler = in_memory(), SurrogateSampler(0)
    sampler.attach(problem)
    every = {p: (world.score(p)[0], product_of(problem.params(p))[0]) for p in product(range(8), repeat=3)}
    found = []
    for _ in range(60):
        params = propose(sampler, study)
        found.append(every[problem.indices(params)])
        tell(study, problem, params, list(found[-1]))
    front = front_of(list(every.values()))
    assert len(set(found) & front) >= 0.5 * len(front)


def test_it_is_a_sampler_for_optuna_itself() -> None:
    world = World(3)
    problem, sampler = world.problem(), SurrogateSampler(2)
    sampler.attach(problem)
    with quiet():
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            params = problem.space.suggest(trial)
            assert trial.suggest_float("other", 0, 1) <= 1
            return world.score(problem.indices(params))

        study.optimize(objective, n_trials=12)
    assert len({problem.indices(t.params) for t in study.trials}) == 12


def test_nothing_new_and_nothing_different_is_no_fault() -> None:
    units = make_space(2).units
    space = ModelSpace(tuple(Unit(u.name, u.slot, u.layers, CHOICES[:2]) for u in units), ())
    table = {u.name: {str(c): float(c.bit_width) for c in CHOICES[:2]} for u in units}
    problem, study, sampler = Problem(space, {}, [(0.0, table)]), in_memory(), SurrogateSampler(0)
    sampler.attach(problem)
    for _ in range(4):
        tell(study, problem, propose(sampler, study), [0.5, 3.0])
    assert len({problem.indices(t.params) for t in study.trials}) == 4
    assert sampler.propose(study) is None
    # Optuna itself has to have some plan.
    with quiet():
        study.sampler = sampler
        assert problem.space.suggest(study.ask()).keys() == problem.space.distributions.keys()


@pytest.mark.parametrize("units", [3, 6])
def test_it_says_when_no_plan_that_keeps_a_bound_is_left(units: int) -> None:
    world = World(units)
    # The sizes of plans with all units at 2 bits, and the next larger ones.
    least = sum(float(row.min()) for row in world.price)
    step = sorted(float(np.sort(row)[1] - row.min()) for row in world.price)
    bound = f"size <= {least + step[1] * 1.0001}"
    problem, study, sampler = world.problem(limits=(bound,)), in_memory(), SurrogateSampler(0)
    sampler.attach(problem)
    while (params := sampler.propose(study)) is not None:
        tell(study, problem, params, list(world.score(problem.indices(params))))
        assert len(study.trials) < 50
    every = np.array(list(product([0, 4], repeat=units)))
    price = sum(np.array(row)[every[:, u]] for u, row in enumerate(world.price))
    fits = {tuple(plan) for plan in every[price <= least + step[1] * 1.0001].tolist()}
    assert {problem.indices(t.params) for t in study.trials} == fits
    assert len(fits) >= 3


@pytest.mark.parametrize("first", [[0.9] * 7 + [0.8], [3.0] * 9 + [2.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
def test_first_trials_that_tie_are_no_fault(first: list[float]) -> None:
    world = World(3)
    problem, study, sampler = world.problem(), in_memory(), SurrogateSampler(0)
    sampler.attach(problem)
    for value in first:
        params = propose(sampler, study)
        tell(study, problem, params, [value, world.score(problem.indices(params))[1]])
    assert problem.indices(propose(sampler, study)) not in {problem.indices(t.params) for t in study.trials}


def test_a_loss_of_0_after_logarithms_is_no_fault() -> None:
    """Losses over many powers of ten are fitted as logarithms; a later one is 0 before the next fit."""
    world = World(3)
    problem, sampler = world.problem(), SurrogateSampler(0)
    sampler.attach(problem)
    rng = np.random.default_rng(1)
    plans, losses = rng.permutation(problem.everything)[:14], 3 * np.exp(2 * rng.normal(size=13))  # type: ignore[arg-type]
    study = in_memory("minimize", "minimize")
    for plan, loss in zip(plans[:13], losses, strict=True):
        tell(study, problem, problem.params(plan), [float(loss), world.score(tuple(plan))[1]])
    propose(sampler, study)
    assert sampler._fitted is not None
    assert sampler._fitted[1].name == "log"
    tell(study, problem, problem.params(plans[13]), [0.0, world.score(tuple(plans[13]))[1]])
    propose(sampler, study)  # warnings are errors: log(0) is one
    assert sampler._fitted[1].name == "plain"


@pytest.mark.parametrize("bits", [(2, 4, 8), (8, 4, 2), (4, 8, 2)])
@pytest.mark.parametrize("layers", [2, 6])
def test_bounds_on_bit_operations_are_kept(layers: int, bits: tuple[int, ...]) -> None:
    """Bit operations multiply the bits of weight and input: sums over units are too small or too large."""
    choices = {
        "weight": tuple(QuantSpec.parse(f"int{b} mse") for b in bits),
        "input": tuple(QuantSpec.parse(f"uint{b} affine mse") for b in bits),
    }
    units = [Unit(f"l{i}.{slot}", slot, (f"l{i}",), choices[slot]) for i in range(layers) for slot in choices]
    space = ModelSpace(tuple(units), ())

    def widths(params: dict[str, Any]) -> list[int]:
        return [unit.choice(params).bit_width for unit in units]  # type: ignore[union-attr]

    def bops(params: dict[str, Any]) -> list[float]:
        each = widths(params)
        return [float(sum(w * a for w, a in zip(each[::2], each[1::2], strict=True)))]

    first = {name: value for unit in units for name, value in unit.params(unit.choices[0]).items()}
    base = bops(first)[0]
    table = {u.name: {str(c): bops(first | u.params(c))[0] - base for c in u.choices} for u in units}
    most = 20 * layers
    bound = (Constraint.parse(f"bops <= {most}"), base, table)
    problem = Problem(space, {}, [(base, table)], [bound], bops, bops)
    assert problem.most[0] >= 64 * layers, "the largest plan counts"
    study, sampler = in_memory(), SurrogateSampler(0)
    sampler.attach(problem)
    for _ in range(30):
        if (params := sampler.propose(study)) is None:
            break
        assert bops(params)[0] <= most
        tell(study, problem, params, [1 - sum(4.0**-b for b in widths(params)) / len(units), *bops(params)])
    kept = sum(bops(problem.params(p))[0] <= most for p in product(range(3), repeat=4)) if layers == 2 else 30
    assert len({problem.indices(t.params) for t in study.trials}) == min(30, kept)


def test_linear_algebra_has_one_thread_while_it_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    seen, best = [], SurrogateSampler._best
    monkeypatch.setattr(SurrogateSampler, "_best", lambda *given: (seen.append(threads()), best(*given))[1])
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        search(World(3), 6)
        assert threads() == before
    assert seen == [{1}, {1}]


def test_without_a_problem_it_says_where_it_belongs() -> None:
    with quiet():
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=SurrogateSampler(0))
    with pytest.raises(QuantizationError, match=r"it is for lq_plugin.search.search and lq-search"):
        study.ask().suggest_int("x", 0, 1)  # Optuna asks the sampler as late as here


def test_a_search_with_it_finds_more_and_goes_on(model: DigitsCNN, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "space": {
            "weight": {"bit_widths": [2, 4, 8], "ranges": ["mse"]},
            "input": ["uint4 affine mse", "uint8 affine mse"],
        },
        "metric": "val/acc",
        "cost": "bops",
        "constraints": ["bytes <= 5000", "val/acc >= 0.3"],
        "sampler": SurrogateSampler,
        "trainer": CPU,
        "calibration_batches": 2,
        "uniform": False,
        "seeds": 3,
        "sensitivity_batches": 1,
        "progress": False,
        "output_dir": tmp_path,
    }
    run(model, DigitsDataModule(batch_size=120), n_trials=7, **given)
    result = run(model, DigitsDataModule(batch_size=120), n_trials=10, **given)
    assert result.study.sampler.__class__ is SurrogateSampler
    complete = result.study.get_trials(states=(TrialState.COMPLETE,))
    assert len(complete) == 10
    assert len({frozenset(trial.params.items()) for trial in complete}) == 10
    assert all(trial.user_attrs["metrics"]["bytes"] <= 5000 for trial in complete)
    assert all(c.cost == c.metrics["bops"] and c.metric >= 0.3 for c in result.candidates)


def test_a_search_ends_when_all_plans_that_keep_the_constraints_are_tried(model: DigitsCNN) -> None:
    given: dict[str, Any] = {
        "space": {"weight": {"bit_widths": [2, 8], "ranges": ["mse"]}},
        "metric": "val/acc",
        "constraints": ["effective_bits <= 4.5"],
        "sampler": SurrogateSampler,
        "trainer": CPU,
        "calibration_batches": 1,
        "seeds": 0,
        "progress": False,
    }
    result = run(model, DigitsDataModule(batch_size=240), n_trials=40, **given)
    trials = result.study.get_trials(deepcopy=False)
    kept = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert 0 < len(kept) < 40
    # No plan is pruned for being another's; only seeds break the bound.
    assert all("repeats" not in trial.user_attrs for trial in trials)
    assert len({frozenset(trial.params.items()) for trial in kept}) == len(kept)
