"""The page of a search whose plans were scored again, in a browser: intervals, means, and the front by its bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lq_plugin.report import ReportData, write_page
from lq_plugin.report.data import BestPlan, StudyReport, TrialReport
from tests.report.browser import Page, chromium, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

#: Number, cost, score of the trial, and mean, low and high of its looks.
TRIALS = [
    (0, 2.0, 0.80, 0.79, 0.77, 0.81),
    (1, 3.0, 0.92, 0.84, 0.78, 0.90),  # lucky: its bound is below that of the next one, which costs as much
    (2, 3.0, 0.88, 0.88, 0.86, 0.90),
    (3, 4.0, 0.87, None, None, None),
]


def study() -> StudyReport:
    trials = [
        TrialReport(
            number, score, cost, "sampled", 0.1, {"acc": score}, number in (0, 2), mean, low, high,
            None if mean is None else 8, 0.83 if low is None else low,
        )
        for number, cost, score, mean, low, high in TRIALS
    ]  # fmt: skip
    best = [BestPlan(number, [8], [None], "rules: [{match: a, weight: int8}]") for number in (2, 0)]
    return StudyReport(
        "study",
        "acc",
        "effective_bits",
        ["effective_bits"],
        True,
        trials,
        layers=["a"],
        best=best,
        hypervolume=[0.1, 0.2, 0.3, 0.3],
        confidence=0.9,
    )


@pytest.mark.slow
def test_intervals_are_drawn_and_the_front_is_chosen_by_bounds(tmp_path: Path) -> None:
    path = write_page(ReportData("searched", study=study()), tmp_path / "report.html")
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1000, "height": 800})
        window = Page(context.new_page())
        page = window.open(path)
        window.settle()
        drawn = page.evaluate(
            """() => [...document.querySelectorAll("[data-figure=pareto] g.interval")].map((g) => {
                const line = g.querySelector("line");
                return [Number(g.dataset.trial), line.y1.baseVal.value, line.y2.baseVal.value]; })"""
        )
        assert sorted(number for number, *_ in drawn) == [0, 2]
        places = {number: (low, high) for number, low, high in drawn}
        # 0.04 high each, on one axis.
        assert places[0][0] - places[0][1] == pytest.approx(places[2][0] - places[2][1], rel=0.01)
        mark = page.evaluate(
            """() => { const b = document.querySelector("[data-figure=pareto] .pick[data-trial='0']").getBBox();
                return b.y + b.height / 2; }"""
        )
        # Between the ends: at the mean, not at the trial's own score.
        assert mark == pytest.approx(sum(places[0]) / 2, abs=1)
        # Of the plan with the highest bound, not the lucky one.
        card = page.evaluate(
            """() => [...document.querySelectorAll(".cards div")].map((d) => d.innerText)
                .find((text) => /best acc/i.test(text))"""
        )
        assert card.split("\n")[1:] == ["0.88", "0.86 … 0.9, at 3 bits"]
        assert "interval of 90 %" in page.inner_text("[data-figure=pareto] .key")
        page.click("[data-figure=pareto] .pick[data-trial='2']")
        facts = page.inner_text(".panel .facts")
        assert "acc, looked at again" in facts
        assert "0.86" in facts
        assert not window.faults
        # Where no plan has scored numbers, none is on the front.
        none = [replace(trial, front=False) for trial in study().trials]
        path = write_page(ReportData("none", study=replace(study(), best=[], trials=none)), tmp_path / "none.html")
        window.open(path)
        assert not window.faults
        context.close()
