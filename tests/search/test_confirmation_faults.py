"""Looks at plans that go wrong: no numbers, exceptions, constraints that are broken, several workers."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest

from lq_plugin import plots
from lq_plugin.demo.digits import DigitsCNN
from lq_plugin.errors import QuantizationError
from lq_plugin.search import Confirm, SearchResult, StudyError
from lq_plugin.search.evaluation.looks import Looks
from lq_plugin.search.shared.database import rdb_storage
from lq_plugin.search.study import confirmation as module
from lq_plugin.search.study.candidates import Candidate, StudyCandidates
from lq_plugin.search.study.confidence import claim_key, look_key, looks_in
from lq_plugin.search.study.confirmation import Confirmation
from lq_plugin.search.study.objective import METRICS, PLAN

from .test_confirmation import Noisy, digits, half


def result_of(space: Noisy) -> SearchResult:
    return SearchResult(space.study, "acc", ["effective_bits"], True, {})


# No numbers


def test_where_every_plan_has_a_look_that_is_no_number_their_own_scores_decide(tmp_path: Path) -> None:
    space = Noisy(0, plans=2)
    before = [c.number for c in space.result().front]
    space.confirmation()
    space.study.set_user_attr(look_key(0, 0), None)
    space.study.set_user_attr(look_key(1, 1), None)
    result = result_of(space)
    assert result.unconfirmed
    assert [c.number for c in result.front] == before
    assert result.best().bound == result.best().metric
    assert (result.write(tmp_path) / "pareto.png").exists()


def test_a_look_that_is_no_number_for_two_plans_counts_for_none(caplog: pytest.LogCaptureFixture) -> None:
    space = Noisy(1, plans=10)

    def take(candidate: Candidate, look: int) -> float | None:
        return None if look in (0, 3) else space.take(candidate, look)

    confirmation = Confirmation(space.study, space, take, Confirm(looks=8), 1000)
    confirmation.finish(space.result(), lambda: False)
    assert "looks [0, 3] are no number for several plans" in caplog.text
    result = space.result()
    assert all(math.isfinite(c.bound) for c in result.candidates)
    assert max(c.interval.looks for c in result.candidates if c.interval is not None) == 6
    # It is asked of no third plan.
    assert sum(look == 0 for each in looks_in(space.study.user_attrs).values() for look in each) == 2
    assert confirmation.means().keys() >= {result.best().number}


def test_an_empty_front_is_drawn() -> None:
    figure = plots.pareto([(2.0, 0.5), (3.0, 0.6)], bounds=[-math.inf, -math.inf])
    assert "Pareto front (0)" in [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# Constraints on the metric


def constrained(*values: float) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for value in values:
        trial = study.ask()
        trial.set_user_attr(METRICS, {"acc": value, "effective_bits": 4.0})
        trial.set_user_attr(PLAN, {"rules": [{"match": "*", "weight": "int8"}]})
        trial.set_constraint("acc >= 0.8", 0.8 - value)
        trial.set_constraint("effective_bits <= 4.5", -0.5)
        study.tell(trial, [value, 4.0])
    return study


def test_a_constraint_on_the_metric_is_kept_by_the_mean_of_looks() -> None:
    study = constrained(0.9, 0.85, 0.7)
    study.set_user_attr(module.CONFIRM, {"looks": {"share": 1.0}, "level": 0.95})
    for trial, scores in {0: [0.7, 0.8], 1: [0.84, 0.86]}.items():
        for look, score in enumerate(scores):
            study.set_user_attr(look_key(trial, look), score)
    candidates = StudyCandidates(study, "acc", ["effective_bits"], True, {}).candidates
    assert [c.number for c in candidates] == [1]


def test_where_no_trial_keeps_the_constraints_the_message_says_so() -> None:
    result = StudyCandidates(constrained(0.7, 0.6), "acc", ["effective_bits"], True, {})
    with pytest.raises(QuantizationError, match="no plan: of 2 complete trials none keeps the constraints"):
        result.best()


# Exceptions


def failing(monkeypatch: pytest.MonkeyPatch, look: int) -> list[int]:
    taken: list[int] = []
    take = Looks.take

    def fails(self: Looks, layer_plans: Any, number: int) -> dict[str, float]:
        taken.append(number)
        if number == look:
            raise ZeroDivisionError("of a look")
        return take(self, layer_plans, number)

    monkeypatch.setattr(Looks, "take", fails)
    return taken


def test_a_look_that_raises_is_not_asked_for_again(model: DigitsCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = failing(monkeypatch, 1)
    result = digits(model, 2, trainer=half, confirm={"looks": 4, "every": 0, "most": 20})
    looks = looks_in(result.study.user_attrs)
    assert 1 <= taken.count(1) <= 2
    assert all(1 not in each for each in looks.values())
    assert max(map(len, looks.values())) == 3


@pytest.mark.parametrize("every", [0, 1])
def test_looks_that_raise_count_as_failures(
    model: DigitsCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    failing(monkeypatch, 0)
    with pytest.raises(StudyError, match=r"0 trials and 1 looks of this run failed(.|\n)*ZeroDivisionError: of a look"):
        digits(model, 2, trainer=half, confirm={"looks": 4, "every": every}, max_failures=0, output_dir=tmp_path)
    assert {"front.csv", "pareto.png", "report.html"} <= {path.name for path in tmp_path.iterdir()}


# Several workers


def test_a_look_that_another_worker_takes_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Noisy(4, plans=3)
    other, seen = space.confirmation(), []

    def take(candidate: Candidate, look: int) -> float | None:
        wanted = other.next(space.result())
        assert wanted is not None
        seen.append(((candidate.number, look), (wanted[0].number, wanted[1])))
        raise KeyboardInterrupt

    mine = Confirmation(space.study, space, take, Confirm(looks=8), 1000)
    with pytest.raises(KeyboardInterrupt):
        mine.step(space.result())
    ((taken, offered),) = seen
    assert taken != offered
    # What was interrupted is free again, and so is what a killed worker has left.
    found = other.next(space.result())
    assert found is not None
    assert (found[0].number, found[1]) == taken
    space.study.set_user_attr(claim_key(*taken), "killed")
    found = other.next(space.result())
    assert found is not None
    assert (found[0].number, found[1]) != taken
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    found = other.next(space.result())
    assert found is not None
    assert (found[0].number, found[1]) == taken


def test_workers_share_the_looks(tmp_path: Path) -> None:
    space = Noisy(5, plans=4, looks=4)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.copy_study(
        from_study_name=space.study.study_name, from_storage=space.study._storage, to_storage=rdb_storage(url),
        to_study_name="s",
    )  # fmt: skip
    taken: list[tuple[int, int, int]] = []
    both = threading.Barrier(2)

    def work(number: int) -> None:
        study = optuna.load_study(study_name="s", storage=rdb_storage(url))
        first = True

        def take(candidate: Candidate, look: int) -> float | None:
            nonlocal first
            if first:
                # Both are at it at the same time.
                both.wait(20)
                first = False
            taken.append((number, candidate.number, look))
            return float(space.true[candidate.number] + 0.01 * math.sin(7 * look + candidate.number))

        result = StudyCandidates(study, "acc", ["effective_bits"], True, {})
        Confirmation(study, space, take, Confirm(looks=4), 10).finish(result, lambda: False)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number for number, *_ in taken} == {0, 1}
    places = [place for _, *place in taken]
    assert len(places) == len({tuple(place) for place in places}) <= 10
    study = optuna.load_study(study_name="s", storage=rdb_storage(url))
    assert sum(map(len, looks_in(study.user_attrs).values())) == len(places)
