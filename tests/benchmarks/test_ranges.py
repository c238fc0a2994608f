"""The benchmark of ranges: each case runs, and rows have both sides of a comparison."""

from __future__ import annotations

import pytest

from benchmarks import ranges


@pytest.mark.parametrize("case", ranges.CASES, ids=lambda case: " ".join(case))
def test_each_case_is_a_call_that_works_again(case: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_COUNTED", 20_000)
    monkeypatch.setattr(ranges, "_SEEN", 20_000)
    monkeypatch.setattr(ranges, "_WEIGHT", (4, 576))
    call = ranges.work(*case, "kl")
    call()
    call()


@pytest.mark.slow
def test_a_row_has_the_seconds_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ranges.measure(["minmax"], "HEAD", rounds=1, threads=1)
    assert [row["name"] for row in rows] == [ranges.name_of(*case, "minmax") for case in ranges.CASES]
    assert all(row["here"] > 0 and row["beside"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)
