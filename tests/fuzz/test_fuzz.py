"""Some mutations: the fuzzer itself runs, is deterministic, and tells a failure from an error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lq_plugin.errors import PlanError
from tests.fuzz.mutate import mutated
from tests.fuzz.run import FAILED, attempt, built, table, targets
from tests.fuzz.target import ERROR, OTHER, SAME, Target

QUICK = {
    "packed files": 30, "plan files": 30, "search settings": 20, "sweep settings": 20, "report.json": 10,
    "lq-explain arguments": 20, "lq-search options": 10, "lq-export options": 15,
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_mutated_inputs_end_in_an_error_of_ours_or_a_result(name: str) -> None:
    with built(targets()[name]) as target:
        target.check()
        found = [attempt(target, 1, case) for case in range(QUICK[name])]
    assert [why for outcome, why in found if outcome == FAILED] == []
    assert ERROR in {outcome for outcome, _ in found}


class Broken(Target):
    name, legitimate = "broken", "never"

    def unmutated(self) -> object:
        return PlanError("no")

    def mutated(self, rng: random.Random) -> object:
        return rng.choice([PlanError("no"), KeyError("x"), "result"])

    def use(self, case: object) -> str:
        if isinstance(case, Exception):
            raise case
        return SAME


def test_only_what_is_promised_is_no_failure(tmp_path: Path) -> None:
    target = Broken(tmp_path)
    for case in range(20):
        drawn = target.mutated(random.Random(f"3/broken/{case}"))
        outcome, why = attempt(target, 3, case)
        assert outcome == (ERROR if isinstance(drawn, PlanError) else FAILED if isinstance(drawn, KeyError) else SAME)
        assert ("KeyError: 'x'" in why) == (outcome == FAILED)


def test_a_target_that_refuses_its_unmutated_input_is_an_error_of_the_target(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="broken: the unmutated input is refused"):
        Broken(tmp_path).check()


def test_mutations_change_copies_and_repeat(tmp_path: Path) -> None:
    tree = {"a": [1, {"b": 2.5}], "c": "text"}
    found = [mutated(random.Random(seed), tree, words=["word"]) for seed in range(200)]
    assert tree == {"a": [1, {"b": 2.5}], "c": "text"}
    assert repr(found) == repr([mutated(random.Random(seed), tree, words=["word"]) for seed in range(200)])
    assert sum(case != tree for case in found) > 150


def test_the_table_says_what_was_counted() -> None:
    from collections import Counter

    text = table({"broken": Counter({ERROR: 3, OTHER: 2, FAILED: 1})}, {"broken": Broken}, 7, 60)
    assert "6 cases, seed 7" in text
    assert "| broken | 6 | 3 | 0 | 2 | 1 |" in text
