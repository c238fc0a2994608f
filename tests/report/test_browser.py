"""The page in a real browser: drawn without a fault, usable with keys, on wide and narrow screens, light and dark.

Screenshots are written to the folder `LQ_SCREENSHOTS` names, else to pytest's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lq_plugin import QAT, QuantMonitor
from lq_plugin.commands.report_sources import load_report
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.report import ReportData, Series, model_report, write_page
from lq_plugin.report.data import Rounding
from lq_plugin.search import Space, search, study_report
from tests.report.browser import Page, chromium, why_not
from tests.report.synthetic import deep_report, large_report, large_study
from tests.report.test_page import EVIL

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

WINDOWS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
MODEL_FIGURES = {
    "flow",
    "boxes",
    "histogram-weight",
    "histogram-input",
    "grid-weight",
    "mse-weight",
    "mse-input",
    "error-map",
}
STUDY_FIGURES = {"pareto", "hypervolume", "parallel", "bits", "importance"}
PAGE_FIGURES = {"layers", "training-0", "training-1", "table-layers", "table-ledger", "table-trials"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("LQ_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Page]]:
    contexts = []

    def window(width: int = 1280, scheme: str = "light", **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options))
        return Page(contexts[-1].new_page())

    yield window
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = study_report(large_study(trials=40, layers=6)).study
    report = replace(deep_report(layers=6, width=16), title="Small", study=study)
    return write_page(report, tmp_path_factory.mktemp("small") / "report.html")


def figures(page: Any) -> set[str]:
    return set(page.evaluate("() => [...document.querySelectorAll('[data-figure]')].map((f) => f.dataset.figure)"))


def check(opened: Page, path: Path) -> None:
    opened.settle()
    assert opened.undrawn() == []
    assert opened.faults == []
    assert opened.requests == [f"file://{path}"]
    assert opened.sideways() <= 0
    assert "[object" not in opened.page.inner_text("body")
    assert "undefined" not in opened.page.inner_text("body")


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_every_figure_is_drawn(
    opened: Callable[..., Page], small: Path, screenshots: Path, width: int, scheme: str
) -> None:
    window = opened(width, scheme)
    page = window.open(small, "#layer=body.4")
    check(window, small)
    assert figures(page) >= MODEL_FIGURES | STUDY_FIGURES | PAGE_FIGURES
    page.screenshot(path=screenshots / f"small_{width}_{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened: Callable[..., Page], small: Path, scheme: str) -> None:
    page = opened(1280, scheme).open(small, "#layer=body.1")
    pairs = page.evaluate(
        """() => {
            const probe = document.createElement("span"); document.body.append(probe);
            const color = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
            const rgb = (name) => color(name).match(/[\\d.]+/g).slice(0, 3).map(Number);
            return [["ink", 4.5], ["muted", 4.5], ["focus", 3], ...[1, 2, 3, 4, 5, 6, 7, 8].map((i) => ["c" + i, 3])]
                .flatMap(([name, least]) => ["paper", "panel"].map((under) => [name, under, least, rgb(name), rgb(under)]));
        }"""
    )  # fmt: skip

    def luminance(rgb: list[float]) -> float:
        linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, under, least, front, back in pairs:
        light, dark = sorted((luminance(front), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, f"{name} on {under}"


def test_a_click_on_a_layer_shows_it(opened: Callable[..., Page], small: Path) -> None:
    window = opened()
    page = window.open(small)
    assert not page.is_visible("#layer")
    page.click(".layer[data-layer='body.2']")
    window.wait_for_text("#layer-title", "body.2")
    window.settle()
    assert window.undrawn() == []
    assert page.evaluate("document.activeElement.id") == "layer-title"
    page.click("[aria-label='next layer']")
    window.wait_for_text("#layer-title", "body.3")
    page.go_back()
    window.wait_for_text("#layer-title", "body.2")
    page.click("text=The same numbers as a table")
    page.click("[data-figure=table-layers] button.link:has-text('head')")
    window.wait_for_text("#layer-title", "head")
    # Levels of groups follow the data: this one has no clipping curve.
    assert "mse-weight" not in figures(page)
    assert window.faults == []


def test_everything_can_be_reached_with_keys(opened: Callable[..., Page], small: Path) -> None:
    window = opened()
    page = window.open(small)
    page.focus(".layer[tabindex='0']")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.layer") == "body.1"
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")
    page.keyboard.press("Enter")
    window.wait_for_text("#layer-title", "body.1")
    page.keyboard.press("Escape")
    assert not page.is_visible("#layer")
    assert page.evaluate("document.activeElement.dataset.layer") == "body.1"
    page.focus("[data-figure=pareto] .pick[tabindex='0']")
    page.keyboard.press("Enter")
    assert page.inner_text("#trial-title").startswith("Trial")
    page.focus("[data-figure=bits] g.pick")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert "rules:" in page.inner_text(".panel pre")
    # A walk through the page: no trap, and every stop can be seen.
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    stops: list[str] = []
    for _ in range(400):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
                const e = document.activeElement, seen = getComputedStyle(e).outlineStyle !== "none" || e.matches("h2, h3");
                return e === document.body ? "" : [e.tagName, e.id, e.getAttribute("class"), e.textContent.slice(0, 30), seen].join("|");
            }"""
        )
        if not stop:
            break
        assert stop.endswith("true"), f"no outline: {stop}"
        stops.append(stop)
    else:
        pytest.fail(f"the focus does not leave the page: {stops[-3:]}")
    assert any("Copy" in stop for stop in stops)
    assert window.faults == []


def test_filter_sort_and_copy(opened: Callable[..., Page], small: Path) -> None:
    window = opened(permissions=["clipboard-read", "clipboard-write"])
    page = window.open(small)
    ledger = page.locator("[data-figure=table-ledger]")
    assert ledger.locator("tbody tr").count() == 6
    ledger.locator("input").fill("body conv2d -body.3")
    assert ledger.locator("tbody tr").all_inner_texts()[0].startswith("body.0")
    assert ledger.locator("tbody tr").count() == 4
    assert "4 of" in ledger.inner_text()
    ledger.locator("thead button", has_text="parameters").click()
    assert ledger.locator("th[aria-sort=descending]").count() == 1
    assert ledger.locator("tbody tr").last.inner_text().startswith("body.0")
    page.click("#plan .copy")
    page.wait_for_selector("#plan :text('copied')")
    text = page.evaluate("navigator.clipboard.readText()")
    assert text == page.locator("#plan pre").inner_text()
    assert "\nrules:\n- match: '*'\n" in text
    assert window.faults == []


def test_brushing_and_choosing_axes(opened: Callable[..., Page], small: Path) -> None:
    window = opened()
    page = window.open(small)
    window.settle()
    lines = "document.querySelectorAll('[data-figure=parallel] svg > path')"
    faint = f"() => [...{lines}].filter((p) => p.getAttribute('opacity') === '0.3').length"
    assert page.evaluate(faint) == 0
    axis = page.locator("[data-figure=parallel] .pick rect").first
    axis.scroll_into_view_if_needed()
    box = axis.bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 10, box["y"] + box["height"] / 3)
    page.mouse.up()
    assert 0 < page.evaluate(faint) < 40
    page.mouse.click(box["x"] + 10, box["y"] + box["height"] * 0.8)
    assert page.evaluate(faint) == 0
    page.select_option("[data-figure=pareto] select", "bytes")
    assert "bytes" in page.locator("[data-figure=pareto] svg").inner_html()
    page.select_option("[data-figure=training-0] select", "input_max")
    assert "body.3" in page.locator("[data-figure=training-0]").inner_text()
    assert window.faults == []


def test_a_figure_is_saved_as_svg(opened: Callable[..., Page], small: Path, tmp_path: Path) -> None:
    window = opened(accept_downloads=True)
    page = window.open(small)
    window.settle()
    with page.expect_download() as download:
        page.click("[data-figure=pareto] .save")
    path = tmp_path / "pareto.svg"
    download.value.save_as(path)
    text = path.read_text()
    assert text.startswith("<svg")
    assert "var(" not in text.partition("<svg")[2].partition("style=")[0]
    assert download.value.suggested_filename == "pareto.svg"


def test_evil_names_stay_text(opened: Callable[..., Page], tmp_path: Path) -> None:
    report = deep_report(3, 8)
    assert report.model is not None
    layers = [replace(report.model.layers[0], name=EVIL, reason=EVIL), *report.model.layers[1:]]
    ledger = [dict(row, name=EVIL, reason=EVIL) for row in report.model.ledger]
    path = write_page(
        replace(report, title=EVIL, model=replace(report.model, layers=layers, ledger=ledger, plan=EVIL)),
        tmp_path / "r.html",
    )
    window = opened()
    dialogs: list[Any] = []
    window.page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
    page = window.open(path)
    page.locator(".layer").first.click()
    window.wait_for_text("#layer-title", EVIL)
    window.settle()
    assert page.locator("img").count() == 0
    assert dialogs == []
    check(window, path)


def test_what_never_moved_is_no_curve(opened: Callable[..., Page], tmp_path: Path) -> None:
    report = deep_report(3, 8)
    assert report.model is not None
    still = [
        Series("quant_layer/body.0/weight_bits", [0, 5], [4.0, 4.0]),
        Series("quant/weight_coverage", [0, 5], [1.0, 1.0]),
    ]
    moved = Series("quant_layer/body.0/weight_flips", [0, 5], [0.1, 0.2])
    for training, titles in (([*still, moved], ["weight_flips"]), (still, [])):
        path = write_page(replace(report, model=replace(report.model, training=training)), tmp_path / "r.html")
        window = opened()
        page = window.open(path)
        check(window, path)
        assert page.locator("[data-figure=training-0] option").all_inner_texts() == titles


def test_learned_roundings_and_curves_of_a_run(opened: Callable[..., Page], screenshots: Path, tmp_path: Path) -> None:
    report = deep_report(4, 16)
    assert report.model is not None
    told = Rounding(900, 60, 40, [0.01, 0.1, 0.2, None, 0.4, 0.6, 0.7, 0.8, 0.9, 0.99], "body", 0.04, 0.02)
    layers = [replace(layer, rounding=told, latency_ms=0.1 + 0.2 * i) for i, layer in enumerate(report.model.layers)]
    path = write_page(replace(report, model=replace(report.model, layers=layers)), tmp_path / "r.html")
    window = opened()
    page = window.open(path, "#layer=body.1")
    check(window, path)
    assert "rounding" in figures(page)
    assert "60 (6 %) went up" in page.inner_text("[data-figure=rounding]")
    assert "0.3 ms" in page.inner_text("#layer")
    assert "latency" in page.inner_text(".strip .lanes")
    # The loss of one batch, float and quantized, stands beside the run's own, and moments of the schedule in all of
    # them.
    key = page.inner_text("[data-figure=training-0]")
    assert "one batch, float" in key
    assert "one batch, quantized" in key
    assert page.locator("[data-figure=training-0] svg line[stroke-dasharray='3 3']").count() == 2
    for what in ("weight_flips", "weight_zeros", "weight_scale_max"):
        page.select_option("[data-figure=training-1] select", what)
        assert page.locator("[data-figure=training-1] svg path[fill=none]").count() == 3
    page.screenshot(path=screenshots / "rounding.png", full_page=True)


@pytest.mark.parametrize("width", [1280, 400])
def test_two_side_by_side(opened: Callable[..., Page], screenshots: Path, tmp_path: Path, width: int) -> None:
    first = replace(deep_report(4, 8, "first"), study=study_report(large_study(20, 4)).study)
    second = replace(deep_report(5, 8, "second"), study=study_report(large_study(25, 4, seed=1)).study)
    path = write_page([first, second], tmp_path / "both.html")
    window = opened(width)
    page = window.open(path, "#layer=body.1")
    check(window, path)
    assert page.inner_text("h1") == "A: first · B: second"
    assert page.locator("#layer [data-figure=boxes]").count() == 2
    # What only one of them has is shown beside nothing.
    page.click("[data-figure=table-differences] button.link:has-text('body.3')")
    window.wait_for_text("#layer-title", "body.3")
    assert page.locator("#layer [data-figure=boxes]").count() == 1
    assert page.locator("[data-figure=pareto]").count() == 1
    assert page.locator("[data-figure=parallel]").count() == 2
    page.screenshot(path=screenshots / f"compare_{width}.png", full_page=True)


def test_two_models_are_drawn_on_one_scale(opened: Callable[..., Page], tmp_path: Path) -> None:
    reports = [deep_report(5, width, title, answered=True) for width, title in ((8, "first"), (16, "second"))]
    page = opened().open(write_page(reports, tmp_path / "both.html"))
    assert page.locator("header h3").all_inner_texts() == ["A: first", "B: second"]
    # The heights of all bars of a lane are to their values as one number.
    bars = page.evaluate(
        """() => [...document.querySelectorAll(".strip")].map((strip) => {
            const lane = [...strip.querySelectorAll(".lanes .lane")].findIndex((l) => l.textContent === "bytes");
            return [...strip.querySelectorAll(".layer")].map(
                (l) => parseFloat(l.querySelectorAll(".lane")[lane].querySelector(".fill").style.height));
        })"""
    )
    values = [[layer.bytes for layer in report.model.layers] for report in reports]  # type: ignore[union-attr]
    most = max(map(max, values))
    assert bars == [[pytest.approx(100 * value / most, abs=0.06) for value in of] for of in values]
    for figure in ("path", "training-0"):
        ticks = [
            [
                text
                for text in plot.locator("svg text").all_text_contents()
                if text.replace(".", "").replace("−", "").isdigit()
            ]
            for plot in page.locator(f"[data-figure={figure}]").all()
        ]
        assert len(ticks) == 2
        assert ticks[0] == ticks[1] != []


def test_an_empty_report_is_a_page(opened: Callable[..., Page], tmp_path: Path) -> None:
    path = write_page(ReportData("nothing"), tmp_path / "empty.html")
    window = opened()
    window.open(path)
    check(window, path)


@pytest.mark.slow
def test_a_hundred_layers_and_five_hundred_trials(
    opened: Callable[..., Page], screenshots: Path, tmp_path: Path
) -> None:
    path = write_page(large_report(), tmp_path / "large.html")
    assert path.stat().st_size < 5e6
    for width, scheme in WINDOWS:
        window = opened(width, scheme)
        page = window.open(path)
        page.locator(".layer[data-layer='body.50']").click()
        window.wait_for_text("#layer-title", "body.50")
        check(window, path)
        assert figures(page) >= MODEL_FIGURES | STUDY_FIGURES | PAGE_FIGURES
        page.screenshot(path=screenshots / f"large_{width}_{scheme}.png", full_page=True)


@pytest.mark.slow
def test_the_page_of_the_digits_demo(opened: Callable[..., Page], screenshots: Path, tmp_path: Path) -> None:
    model, data = DigitsCNN(width=8), DigitsDataModule()
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    Trainer(max_epochs=2, logger=False, **quiet).fit(model, datamodule=data)
    space = Space(weight={"bit_widths": [2, 4, 8]}, input="uint8 affine mse")
    trainer = partial(Trainer, accelerator="cpu")
    result = search(model, data, space, "val/acc", 14, output_dir=tmp_path / "search", trainer=trainer, progress=False)
    qat = QAT(result.best().plan, schedule={"activations_start": "epoch 1"})
    logger = CSVLogger(tmp_path, name="fit", version="csv")
    fit = Trainer(
        max_epochs=2, callbacks=[qat, QuantMonitor(images=False)], logger=logger, log_every_n_steps=2, **quiet
    )
    fit.fit(model, datamodule=data)
    report = model_report(
        model,
        qat.plan,
        ledger=qat.ledger,
        recording=qat.recording,
        statistics=qat.statistics,
        epoch_steps=int(fit.num_training_batches),
    )
    report.save(tmp_path / "fit" / "csv" / "quant" / "report.json")
    path = write_page(load_report(tmp_path), tmp_path / "report.html")
    for width, scheme in WINDOWS:
        window = opened(width, scheme)
        page = window.open(path)
        page.locator(".layer[data-layer='block.conv1']").click()
        window.wait_for_text("#layer-title", "block.conv1")
        check(window, path)
        assert figures(page) >= MODEL_FIGURES | STUDY_FIGURES - {"importance"} | PAGE_FIGURES
        page.screenshot(path=screenshots / f"demo_{width}_{scheme}.png", full_page=True)
