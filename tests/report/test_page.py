"""The page: nothing in the data becomes markup, nothing is loaded, and it stays small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lq_plugin.errors import QuantizationError
from lq_plugin.report import ReportData, render, write_page
from lq_plugin.report.data import ModelReport
from lq_plugin.report.page import SCRIPTS, asset
from tests.report.synthetic import deep_report

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 & ' \" [bold]"


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text[self.inside] = self.text.get(self.inside, "") + data


def evil_report() -> ReportData:
    return ReportData(
        EVIL,
        ModelReport(EVIL, f"rules: {EVIL}", {EVIL: 1.0}, [], 1.0, 1.0, [{"name": EVIL, "reason": EVIL}], {EVIL: 1.0}),
    )


def test_names_never_become_markup() -> None:
    page = render(evil_report())
    found = Tags(page)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in found.tags]
    assert found.text["title"] == EVIL
    assert json.loads(found.text["report-data"])["runs"][0]["title"] == EVIL
    assert "\u2028" not in page.partition("<main")[2]


def test_the_script_writes_text_and_no_markup() -> None:
    code = "\n".join(asset(name) for name in SCRIPTS)
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "fetch(",
        "XMLHttpRequest",
        "import(",
    ):
        assert way not in code, way


def test_nothing_is_loaded() -> None:
    page = render(deep_report(4, 8))
    found = Tags(page)
    # The XML namespace of SVG is the one address in it.
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not [attrs for _, attrs in found.tags if attrs.get("src")]
    assert [attrs["href"] for tag, attrs in found.tags if tag == "link"] == ["data:,"]
    (policy,) = [attrs["content"] for _, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_one_report_or_two(tmp_path: Path) -> None:
    both = Tags(write_page([ReportData("one"), ReportData("two")], tmp_path / "deep" / "report.html").read_text())
    assert [run["title"] for run in json.loads(both.text["report-data"])["runs"]] == ["one", "two"]
    assert both.text["title"] == "one · two"
    for wrong in ([], [ReportData("x")] * 3):
        with pytest.raises(QuantizationError, match=f"one report or two side by side, got {len(wrong)}"):
            render(wrong)


def test_equal_reports_are_equal_bytes() -> None:
    assert render(deep_report(3, 8)) == render(deep_report(3, 8))


def test_a_layer_takes_less_than_30_kilobytes() -> None:
    # 100 layers then leave room for 500 trials under 5 MB; the whole is measured in test_browser.
    few, more = (len(render(deep_report(layers, 32)).encode()) for layers in (4, 8))
    assert (more - few) / 4 < 30_000
    assert len(render(ReportData("empty")).encode()) < 100_000
