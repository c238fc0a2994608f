"""Plans near a front are scored again: intervals, which plan is named best, and what looks read."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.report.data import ReportData
from lq_plugin.search import Confirm, SearchConfig, SearchResult, StudyError, search
from lq_plugin.search.study.candidates import Candidate, StudyCandidates
from lq_plugin.search.study.confidence import (
    CONFIRM,
    better,
    interval,
    look_key,
    looks_in,
    spread,
    spread_of_differences,
)
from lq_plugin.search.study.confirmation import Confirmation
from lq_plugin.search.study.objective import METRICS, PLAN

from .conftest import CPU

SPACE = {"weight": {"bit_widths": [2, 3, 4, 8], "granularities": ["per_channel"], "ranges": ["mse"]}}


# Statistics


def test_an_interval_is_students() -> None:
    scores = [0.61, 0.7, 0.66, 0.58, 0.69]
    found = interval(scores, 0.9)
    assert found is not None
    low, high = stats.t.interval(0.9, len(scores) - 1, np.mean(scores), stats.sem(scores))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.looks) == (pytest.approx(np.mean(scores)), 5)
    assert interval([0.5], 0.9) is None


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("looks", [3, 8])
def test_intervals_of_accuracies_cover_at_their_nominal_rate(level: float, looks: int) -> None:
    rng = np.random.default_rng(0)
    runs, right = 2000, 0.87
    shares = rng.binomial(256, right, size=(runs, looks)) / 256
    held = sum(found.low <= right <= found.high for row in shares if (found := interval(row.tolist(), level)))
    # Five standard errors of a share of 2,000.
    assert held / runs == pytest.approx(level, abs=5 * (level * (1 - level) / runs) ** 0.5)


def test_two_plans_are_compared_by_what_they_score_on_the_same_batches() -> None:
    hard = [0.0, -0.2, 0.1, -0.3]
    good = {look: 0.90 + h + e for look, (h, e) in enumerate(zip(hard, [0.001, 0.0, -0.001, 0.0], strict=True))}
    bad = {look: 0.88 + h for look, h in enumerate(hard)}
    assert better(good, bad, 0.95)
    assert not better(bad, good, 0.95)
    # Their intervals overlap by far.
    one, other = interval(list(good.values()), 0.95), interval(list(bad.values()), 0.95)
    assert one is not None
    assert other is not None
    assert one.low < other.mean
    assert not better(good, {look + 4: score for look, score in bad.items()}, 0.95)
    assert not better({0: 0.9, 1: 0.9}, {0: 0.8, 1: 0.8}, 0.95)


def test_spreads_are_pooled_over_plans() -> None:
    assert spread([{0: 1.0}, {0: 2.0}]) is None
    found = spread([{0: 1.0, 1: 3.0}, {0: 10.0, 1: 10.0, 2: 13.0}, {0: 5.0, 1: None}])
    assert found is not None
    # (2 + 6) / (1 + 2)
    assert found == (pytest.approx((8 / 3) ** 0.5), 3)
    assert spread_of_differences([{0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}]) == pytest.approx(0.5**0.5)
    assert spread_of_differences([]) is None
    assert spread_of_differences([{0: 1.0}, {0: 0.0}]) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"looks": 2}, "looks is an integer, 3 or more, got 2"),
        ({"level": 1.0}, "level is a number between 0 and 1, as 0.95, got 1.0"),
        ({"most": -1}, "most is an integer, 0 or more, got -1"),
        ({"look": 8}, "unknown option 'look'; valid: looks, level, most, every. Did you mean 'looks'"),
        (8, "confirm is a mapping such as {looks: 8}, or None, got 8"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(model: DigitsCNN, given: Any, message: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        SearchConfig(model, None, SPACE, "val/acc", confirm=given)
    assert message in str(caught.value)


# A study with a simulated metric


class Noisy:
    """A search whose plans have known true accuracies; scores are shares of right answers on shared batches.

    A batch is as hard for all plans; the answers to its samples are drawn for each.
    """

    def __init__(self, seed: int, plans: int = 40, samples: int = 100, looks: int = 8, maximize: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.sign = 1.0 if maximize else -1.0
        self.samples, self.number, self.share = samples, looks, 1.0
        self.costs = self.rng.uniform(2.0, 8.0, plans)
        self.true = 0.9 - 0.4 * 2.0 ** -(self.costs - 1.0) - self.rng.exponential(0.02, plans)
        self.batches = self.rng.normal(0.0, 0.01, looks + 1)
        self.study = optuna.create_study(directions=["maximize" if maximize else "minimize", "minimize"])
        for cost, true in zip(self.costs, self.true, strict=True):
            value, plan = self.score(true, looks), {"rules": [{"match": "*", "weight": "int8"}]}
            attrs = {METRICS: {"acc": value, "effective_bits": float(cost)}, PLAN: plan}
            self.study.add_trial(
                optuna.trial.create_trial(values=[value, float(cost)], user_attrs=attrs, state=TrialState.COMPLETE)
            )

    def describe(self) -> dict[str, Any]:
        return {"looks": self.number, "share": self.share}

    def score(self, true: float, look: int) -> float:
        chance = np.clip(true + self.batches[look], 0.0, 1.0)
        return float(self.sign * self.rng.binomial(self.samples, chance) / self.samples)

    def take(self, candidate: Candidate, look: int) -> float | None:
        return self.score(self.true[candidate.number], look)

    def result(self) -> StudyCandidates:
        return StudyCandidates(self.study, "acc", ["effective_bits"], self.sign > 0, {})

    def confirmation(self, most: int = 1000, **options: Any) -> Confirmation:
        return Confirmation(self.study, self, self.take, Confirm(looks=self.number, **options), most)

    def confirmed(self, most: int = 1000) -> StudyCandidates:
        self.confirmation(most).finish(self.result(), lambda: False)
        return self.result()


@pytest.fixture(scope="module", autouse=True)
def silent() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.slow
def test_the_plan_that_is_named_best_is_better_than_the_luckiest_one() -> None:
    lucky, sure, said_lucky, said_sure, spent = [], [], [], [], []
    for seed in range(25):
        space = Noisy(seed, samples=60)
        before = space.result().best(6.0)
        after = space.confirmed(most=200).best(6.0)
        lucky.append(space.true[before.number])
        sure.append(space.true[after.number])
        said_lucky.append(before.metric)
        assert after.interval is not None
        said_sure.append(after.interval.mean)
        spent.append(sum(map(len, looks_in(space.study.user_attrs).values())))
    gained = np.array(sure) - np.array(lucky)
    # On average, and beyond what chance would give: three standard errors above zero.
    assert gained.mean() > 3 * gained.std(ddof=1) / len(gained) ** 0.5
    # The luckiest score promises what its plan does not hold, the mean of looks much less.
    excess = np.mean(said_lucky) - np.mean(lucky)
    assert excess > 0.01
    assert abs(np.mean(said_sure) - np.mean(sure)) < excess / 2
    assert max(spent) <= 200


@pytest.mark.slow
def test_lower_bounds_and_intervals_of_confirmed_plans_hold() -> None:
    held = above = number = best_held = 0
    runs = 60
    for seed in range(runs):
        space = Noisy(1000 + seed, plans=12)
        result = space.confirmed()
        full = [c for c in result.candidates if c.interval is not None and c.interval.looks == space.number]
        # What is true of other batches too: their hardness averages out.
        for c in full:
            assert c.interval is not None
            held += c.interval.low <= space.true[c.number] <= c.interval.high
            above += c.interval.low <= space.true[c.number]
            number += 1
        best_held += result.best().bound <= space.true[result.best().number]
    # Plans that lose early are left out, and all plans of a run share its batches: some runs are better than others.
    assert number > 3 * runs
    assert held / number == pytest.approx(0.95, abs=0.03)
    assert above / number == pytest.approx(0.975, abs=0.025)
    # The highest of several lower bounds holds less often than each of them.
    assert best_held / runs > 0.75


def test_looks_go_to_the_plans_near_the_front() -> None:
    space = Noisy(3, plans=30, samples=500)
    result = space.confirmed()
    looks = looks_in(space.study.user_attrs)
    true_front = [
        i
        for i in range(len(space.true))
        if not any(space.costs[j] <= space.costs[i] and space.true[j] > space.true[i] for j in range(len(space.true)))
    ]
    gaps = [
        max(space.true[j] for j in range(len(space.true)) if space.costs[j] <= space.costs[i]) - space.true[i]
        for i in range(len(space.true))
    ]
    counts = np.array([len(looks.get(i, {})) for i in range(len(space.true))])
    assert np.average(gaps, weights=counts) < 0.7 * np.mean(gaps)
    assert len(set(true_front) & looks.keys()) >= 0.8 * len(true_front)
    # Who loses gets no more.
    assert min(map(len, looks.values())) < space.number
    # Nothing is left to do, and nothing more is done.
    assert space.confirmation().next(result) is None


def test_the_front_goes_by_the_lower_bounds_for_minimized_metrics_also() -> None:
    ways = {}
    for maximize in (True, False):
        space = Noisy(5, maximize=maximize)
        result = space.confirmed(most=100)
        ways[maximize] = [c.number for c in result.front], [space.sign * c.bound for c in result.candidates]
        for c in result.candidates:
            if c.interval is not None:
                assert c.bound == (c.interval.low if maximize else c.interval.high)
        assert result.best(5.0).bound == (max if maximize else min)(c.bound for c in result.front if c.cost <= 5.0)
    assert ways[True][0] == ways[False][0]
    assert ways[True][1] == pytest.approx(ways[False][1])


def test_a_plan_that_was_scored_once_has_the_noise_of_the_others() -> None:
    space = Noisy(0, plans=5)
    space.share = 0.25
    space.confirmation(most=0)
    for trial, scores in {0: [0.5, 0.7], 1: [0.4, 0.4, 0.7]}.items():
        for look, score in enumerate(scores):
            space.study.set_user_attr(look_key(trial, look), score)
    candidates = space.result().candidates
    # s² = (0.02 + 0.06) / 3; a trial reads four times what a look reads.
    noise = stats.t.ppf(0.975, 3) * (0.08 / 3) ** 0.5 / 2
    assert candidates[2].interval is None
    assert candidates[2].bound == pytest.approx(candidates[2].metric - noise)
    assert candidates[0].interval is not None
    assert candidates[0].interval.mean == pytest.approx(0.6)


def test_a_plan_whose_look_is_no_number_is_never_the_best() -> None:
    space = Noisy(1, plans=10)
    best = space.result().best()

    def take(candidate: Candidate, look: int) -> float | None:
        return None if candidate.number == best.number else space.take(candidate, look)

    Confirmation(space.study, space, take, Confirm(looks=8), 1000).finish(space.result(), lambda: False)
    result = space.result()
    assert looks_in(space.study.user_attrs)[best.number] == {0: None}
    assert result.candidates[best.number].bound == -np.inf
    assert best.number not in [c.number for c in result.front]


def test_what_a_budget_leaves_out_is_not_taken_and_a_stop_ends_it() -> None:
    space = Noisy(2)
    confirmation = space.confirmation(most=3)
    confirmation.finish(space.result(), lambda: False)
    assert sum(map(len, confirmation.scores().values())) == 3
    more = Noisy(2).confirmation()
    more.finish(space.result(), lambda: True)
    assert not more.scores()


def test_looks_of_another_kind_are_refused() -> None:
    space = Noisy(2)
    space.confirmation()
    space.share = 0.5
    with pytest.raises(StudyError, match="has looks of another kind"):
        space.confirmation()
    space.share = 1.0
    space.confirmation(level=0.8)
    assert space.study.user_attrs[CONFIRM]["level"] == 0.8


# Whole searches


def digits(model: DigitsCNN, trials: int, **options: Any) -> SearchResult:
    given: dict[str, Any] = {"calibration_batches": 1, "progress": False, "seeds": 0, "confirm": {"looks": 4}} | options
    return search(model, DigitsDataModule(batch_size=30), SPACE, "val/acc", trials, **given)


def half(**options: Any) -> Any:
    return CPU(limit_val_batches=4, **options)


def test_a_search_confirms_its_front(model: DigitsCNN, tmp_path: Path) -> None:
    tested = DigitsDataModule.test_dataloader
    DigitsDataModule.test_dataloader = _never  # type: ignore[method-assign]
    try:
        result = digits(model, 6, trainer=half, output_dir=tmp_path, confirm={"looks": 4, "most": 12})
    finally:
        DigitsDataModule.test_dataloader = tested  # type: ignore[method-assign]
    looks = looks_in(result.study.user_attrs)
    assert 3 < sum(map(len, looks.values())) <= 12
    # Each look is what the model scores on its batches.
    trial, scores = next(iter(looks.items()))
    plan = next(c.plan for c in result.candidates if c.number == trial)
    assert scores[0] == pytest.approx(_accuracy(model, plan, range(120, 180)), abs=1e-6)

    rows = {int(row["trial"]): row for row in csv.DictReader((tmp_path / "front.csv").read_text().splitlines())}
    report = ReportData.load(tmp_path / "report.json").study
    assert report is not None
    assert report.confidence == 0.95
    shown = {t.number: t for t in report.trials}
    confirmed = [c for c in result.candidates if c.interval is not None]
    assert confirmed
    for c in confirmed:
        assert c.interval is not None
        mean = np.mean(list(looks[c.number].values()))
        assert c.interval.mean == pytest.approx(mean)
        assert c.interval.low <= mean <= c.interval.high
        assert (shown[c.number].mean, shown[c.number].looks) == (pytest.approx(mean, rel=1e-5), c.interval.looks)
        if c.number in rows:
            assert float(rows[c.number]["confirmed/low"]) == pytest.approx(c.interval.low)
            assert int(rows[c.number]["confirmed/looks"]) == len(looks[c.number])
    assert "confirmed" in [str(column.header) for column in result.table().columns]


def _never(self: Any) -> Any:
    raise AssertionError("the test split is read")


def _accuracy(model: DigitsCNN, plan: Any, images: range) -> float:
    from lq_plugin import PTQ

    class Part(DigitsDataModule):
        def val_dataloader(self) -> Any:
            found = self.splits["val"]
            return DataLoader(TensorDataset(*(t[images.start : images.stop] for t in found.tensors)), batch_size=30)

    trainer = CPU(
        logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[PTQ(plan, calibration_batches=1)],
    )  # fmt: skip
    return float(trainer.validate(model, Part(batch_size=30), verbose=False)[0]["val/acc"])


def test_looks_come_during_the_search_and_go_on_with_it(model: DigitsCNN) -> None:
    storage = optuna.storages.InMemoryStorage()
    seen: list[int] = []

    def after(result: SearchResult) -> None:
        seen.append(sum(map(len, looks_in(result.study.user_attrs).values())))

    options: dict[str, Any] = {"trainer": half, "storage": storage}
    digits(model, 4, confirm={"looks": 3, "every": 2, "most": 3}, on_trial=after, **options)
    assert seen == [0, 1, 1, 2]
    result = digits(model, 5, confirm={"looks": 3, "every": 0, "most": 8}, **options)
    assert sum(map(len, looks_in(result.study.user_attrs).values())) <= 8
    with pytest.raises(StudyError, match="looks of another kind"):
        digits(model, 5, confirm={"looks": 4}, **options)


def test_a_rung_that_trains_is_trained_again(model: DigitsCNN) -> None:
    rung = {"qat": {"max_steps": 2, "lr": 0.05}}
    result = digits(model, 2, trainer=CPU, fidelity=[rung], confirm={"looks": 3, "most": 3}, promote_first=0)
    (scores,) = looks_in(result.study.user_attrs).values()
    assert None not in scores.values()
    # The same batches, after another training.
    assert len(set(scores.values())) >= 2


@pytest.mark.parametrize("kind", ["tpe", "surrogate"])
def test_proposals_learn_from_the_looks(model: DigitsCNN, kind: str) -> None:
    from lq_plugin.search import SurrogateSampler, tpe
    from lq_plugin.search.study.worker import StudyWorker

    sampler = tpe if kind == "tpe" else SurrogateSampler
    config = SearchConfig(
        model, DigitsDataModule(batch_size=30), SPACE, "val/acc", 7, trainer=half, calibration_batches=1,
        progress=False, seeds=2, sensitivity_batches=1, confirm={"looks": 3, "every": 2}, sampler=sampler,
    )  # fmt: skip
    worker = StudyWorker(config)
    worker.work()
    assert worker.confirmation is not None
    means = worker.confirmation.means()
    assert means
    trial, mean = next(iter(means.items()))
    if kind == "surrogate":
        assert isinstance(worker.sampler, SurrogateSampler)
        study = worker.study
        complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
        read = worker.sampler._read(study, complete)
        assert read.values[[t.number for t in complete].index(trial)] == pytest.approx(mean)
