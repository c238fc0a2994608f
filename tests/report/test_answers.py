"""Answers of the page, read from its own picture in a browser and compared with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lq_plugin.report import ReportData, write_page
from lq_plugin.report.data import StudyReport
from tests.report.browser import Page, chromium, why_not
from tests.report.synthetic import searched_report

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

#: What the element with the focus is clipped by, or hidden behind; "" where all of its outline can be seen.
CLIPPED = """() => {
    const e = document.activeElement, r = e.getBoundingClientRect(), edge = 2, nav = document.querySelector("nav");
    const box = {left: r.left - edge, right: r.right + edge, top: r.top - edge, bottom: r.bottom + edge};
    const says = (name, c) => {
        const wide = r.width > c.right - c.left - 2 * edge, high = r.height > c.bottom - c.top - 2 * edge;
        if (!wide && (box.left < c.left - 0.5 || box.right > c.right + 0.5)) return `${name} clips left or right`;
        if (!high && (box.top < c.top - 0.5 || box.bottom > c.bottom + 0.5)) return `${name} clips above or below`;
        return "";
    };
    for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) {
        const style = getComputedStyle(p);
        if (style.overflowX === "visible" && style.overflowY === "visible") continue;
        const c = p.getBoundingClientRect(), found = says(p.className || p.tagName, c);
        if (found) return found;
    }
    const g = e.closest?.("[clip-path]");
    if (g) {
        const clip = g.ownerSVGElement.querySelector("clipPath rect"), m = g.ownerSVGElement.getBoundingClientRect();
        const x = m.left + Number(clip.getAttribute("x")), y = m.top + Number(clip.getAttribute("y"));
        const w = Number(clip.getAttribute("width")), h = Number(clip.getAttribute("height"));
        const found = says("clip-path", {left: x, top: y, right: x + w, bottom: y + h});
        if (found) return found;
    }
    const found = says("window", {left: 0, right: innerWidth, top: 0, bottom: innerHeight});
    if (found) return found;
    const n = nav.getBoundingClientRect(), above = nav.contains(e) || e.matches(".skip") || n.top > 0;
    return above || r.height > innerHeight / 2 || box.top >= n.bottom - 0.5 ? "" : "under the navigation";
}"""


@pytest.fixture(scope="module")
def report() -> ReportData:
    return searched_report()


@pytest.fixture(scope="module")
def path(report: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(report, tmp_path_factory.mktemp("answers") / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Callable[..., Page]]:
    contexts = []

    def window(width: int = 1280, scheme: str = "light") -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = Page(contexts[-1].new_page())
        page.open(path)
        page.settle()
        return page

    yield window
    for context in contexts:
        context.close()


def study_of(report: ReportData) -> StudyReport:
    assert report.study is not None
    return report.study


def points(page: Any) -> dict[int, tuple[float, float]]:
    """Returns the place of each drawn trial, by number."""
    found = page.evaluate(
        """() => [...document.querySelectorAll("[data-figure=pareto] .pick")].map((m) => {
            const b = m.getBBox(); return [Number(m.dataset.trial), b.x + b.width / 2, b.y + b.height / 2]; })"""
    )
    return {number: (x, y) for number, x, y in found}


def test_scores_and_bytes_are_those_of_the_data(opened: Callable[..., Page], report: ReportData) -> None:
    page = opened().page
    model = report.model
    assert model is not None
    assert [s.variant for s in model.scores] == ["float", "PTQ", "QAT"]
    cards = page.locator("header .cards > div").all_inner_texts()
    assert [card.split("\n")[:2] for card in cards[:3]] == [
        ["val/acc, float", "95.5 %"],
        ["val/acc, PTQ", "87 %"],
        ["val/acc, QAT", "93.5 %"],
    ]
    # Wilson's interval of 191 of 200, by hand: 0.9168 .. 0.9761.
    assert cards[0].split("\n")[2] == "91.7 … 97.6 %"
    # One model's cards: those of the search are in its own part.
    assert not any("front" in card or "trials" in card for card in cards)
    assert "on the front" in page.inner_text("#study .cards")
    widths = dict(
        page.evaluate(
            "() => [...document.querySelectorAll('[data-part]')].map((r) => [r.dataset.part, r.getBBox().width])"
        )
    )
    whole = sum(model.stored.values())
    assert whole == model.totals["bytes"]
    for name, width in widths.items():
        assert width / sum(widths.values()) == pytest.approx(model.stored[name] / whole, abs=0.01)
    assert "2026-01-02 03:04 UTC" in page.inner_text("#made")


def test_layers_in_trouble_are_those_under_10_db(opened: Callable[..., Page], report: ReportData) -> None:
    page = opened().page
    assert report.model is not None
    wanted = {
        layer.name
        for layer in report.model.layers
        if any(ratio < 10 for ratio in [*layer.sqnr_db.values(), *layer.output_db.values()])
    }
    assert 0 < len(wanted) < len(report.model.layers)
    found = page.evaluate("() => [...document.querySelectorAll('.layer.trouble')].map((l) => l.dataset.layer)")
    assert set(found) == wanted
    assert f"{len(wanted)} in trouble" in page.inner_text("header .cards")
    assert "under 10 dB" in page.inner_text(".criterion")
    # Not by colour alone.
    assert page.locator(".layer.trouble i").count() == len(wanted)


def test_the_curves_along_the_network_are_the_layers(opened: Callable[..., Page], report: ReportData) -> None:
    page = opened().page
    assert report.model is not None
    for what, name in (("alone", "alone"), ("along", "along")):
        d = page.get_attribute(f"[data-figure=path] [data-curve={name}]", "d")
        ys = [float(point.split(",")[1]) for point in d[1:].split("L")]
        values = [layer.output_db[what] for layer in report.model.layers]
        # Higher on the screen is more, and the axis is linear: one factor and one offset for all.
        slope = (ys[1] - ys[0]) / (values[1] - values[0])
        assert slope < 0
        assert ys == pytest.approx([ys[0] + slope * (value - values[0]) for value in values], abs=0.3)


def test_the_front_fills_the_picture_and_all_trials_are_a_button_away(
    opened: Callable[..., Page], report: ReportData
) -> None:
    page, study = opened().page, study_of(report)
    near = points(page)
    front = [t for t in study.trials if t.front]
    top = max(t.metric for t in front)
    assert {t.number for t in front if t.metric > top - 0.02} <= set(near)
    assert len(near) < len(study.trials)
    assert f"{len(study.trials) - len(near)} trials outside of the picture" in page.text_content(
        "[data-figure=pareto] .beyond"
    )
    page.click("[data-figure=pareto] button.all")
    everything = points(page)
    assert set(everything) == {t.number for t in study.trials}
    assert page.locator("[data-figure=pareto] .beyond").count() == 0
    # The part around the front has become smaller.
    both = [t for t in front if t.number in near]
    spread = [max(p[t.number][0] for t in both) - min(p[t.number][0] for t in both) for p in (near, everything)]
    assert spread[0] > 1.2 * spread[1]
    page.click("[data-figure=pareto] button.all")
    assert points(page) == near


def test_the_trained_plan_and_the_model_after_qat_are_marked(opened: Callable[..., Page], report: ReportData) -> None:
    page, study = opened().page, study_of(report)
    trial = next(t for t in study.trials if t.number == report.trained)
    places = points(page)
    ring = page.evaluate(
        """() => { const c = document.querySelector(".trained");
            return [Number(c.dataset.trial), c.cx.baseVal.value, c.cy.baseVal.value]; }"""
    )
    assert ring[0] == trial.number
    assert ring[1:] == pytest.approx(places[trial.number], abs=1)
    own = page.evaluate(
        """() => { const g = document.querySelector('[data-own]'), r = g.querySelector('rect').getBBox();
            return [g.dataset.own, Number(g.dataset.value), r.x + r.width / 2, r.y + r.height / 2]; }"""
    )
    assert own[:2] == ["QAT", 0.935]
    assert own[2] == pytest.approx(places[trial.number][0], abs=1)
    # Its height on the axis that the trials define.
    other = next(t for t in study.trials if t.number in places and abs(t.metric - trial.metric) > 0.005)
    slope = (places[other.number][1] - places[trial.number][1]) / (other.metric - trial.metric)
    assert own[3] == pytest.approx(places[trial.number][1] + slope * (0.935 - trial.metric), abs=1.5)


def test_legend_table_and_trial_speak_one_language(
    opened: Callable[..., Page], tmp_path: Path, report: ReportData
) -> None:
    page = opened().page
    text = page.inner_text("body")
    assert "ilp" not in text
    assert "greedy" not in text
    legend = page.inner_text("[data-figure=pareto] .key")
    assert "uniform bits" in legend
    assert "plan of this page's model" in legend
    page.click("text=All trials as a table")
    assert "uniform 4 bits" in page.inner_text("[data-figure=table-trials]")


def test_star_and_in_force_are_explained(opened: Callable[..., Page]) -> None:
    window = opened()
    page = window.page
    page.click(".layer[data-layer='body.1']")
    window.wait_for_text("#layer-title", "body.1")
    marks = page.locator("[data-figure=histogram-weight]").inner_text()
    assert "★: the smallest squared error on this tensor" in marks
    assert "“in force”: the range that the layer uses now" in marks


def test_sensitivities_are_those_of_the_search(opened: Callable[..., Page], report: ReportData) -> None:
    page = opened().page
    assert report.sensitivity is not None
    found = page.evaluate(
        """() => [...document.querySelectorAll("[data-unit]")]
            .map((r) => [r.dataset.unit, r.dataset.choice, r.getAttribute("fill")])"""
    )
    assert {(unit, choice) for unit, choice, _ in found} == {
        (unit, choice.split()[0]) for unit, row in report.sensitivity.values.items() for choice in row
    }
    # The most sensitive first, and brightest.
    assert found[0][0] == "head.weight"
    assert found[0][2] == "rgb(253,231,37)"
    assert "KL divergence" in page.inner_text("[data-figure=sensitivity] figcaption")


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 400])
def test_the_focus_is_never_in_a_clipped_place(opened: Callable[..., Page], width: int) -> None:
    window = opened(width)
    page = window.page
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.click(".layer[data-layer='body.1']")
    window.wait_for_text("#layer-title", "body.1")
    window.settle()
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    faults, stops = [], 0
    for _ in range(600):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        stops += 1
        if fault := page.evaluate(CLIPPED):
            what = page.evaluate("document.activeElement.outerHTML.slice(0, 140)")
            faults.append(f"{fault}: {what}")
    assert stops > 60
    assert not faults, "\n".join(faults)
    # By arrow keys too.
    page.focus(".layer[tabindex='0']")
    for key in ("End", "Home", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
        assert page.evaluate(CLIPPED) == "", key
