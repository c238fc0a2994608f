"""One static HTML page: the data as JSON, the drawing as script, with nothing to load or serve."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lq_plugin.errors import QuantizationError
from lq_plugin.report.data import ReportData
from lq_plugin.report.origins import KINDS, kind_of, told
from lq_plugin.utilities.files import make_folder, write_file

SCRIPTS = ("draw.js", "tables.js", "views.js", "layers.js", "front.js", "study.js", "answers.js", "page.js")
STYLE = "page.css"
# The browser itself refuses every request, whatever a name in the data may hold.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="lq_plugin">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">skip to content</a>
<header><h1>{title}</h1></header>
<nav aria-label="parts of the page"><ul></ul></nav>
<main id="main"><noscript>
<p>The figures of this page are drawn by a script in it; switch JavaScript on.</p></noscript></main>
<footer>Made by lq_plugin. This file is complete: it loads nothing.</footer>
<script type="application/json" id="report-data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def render(reports: ReportData | Sequence[ReportData]) -> str:
    """Returns the page of one report, or of two side by side.

    Raises:
        QuantizationError: none, or more than two.

    >>> page = render(ReportData("a </script> b"))
    >>> page.count("</script>"), "<title>a &lt;/script&gt; b</title>" in page
    (2, True)
    """
    chosen = [reports] if isinstance(reports, ReportData) else list(reports)
    if len(chosen) not in (1, 2):
        raise QuantizationError(f"a page shows one report or two side by side, got {len(chosen)}")
    runs = [_with_words(json.loads(report.to_json())) for report in chosen]
    data = json.dumps({"runs": runs}, separators=(",", ":"), ensure_ascii=False)
    # Inside a script element nothing is an entity, and "</" would end it.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return _PAGE.format(
        policy=html.escape(_POLICY),
        title=html.escape(" · ".join(report.title for report in chosen)),
        style=asset(STYLE),
        data=data,
        script="\n".join(asset(name) for name in SCRIPTS),
    )


def write_page(reports: ReportData | Sequence[ReportData], path: str | Path) -> Path:
    """Writes the page; folders are made."""
    path = Path(path)
    make_folder(path.parent)
    write_file(path, render(reports))
    return path


def _with_words(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a report with the origin of each trial in the words of the legend, and its kind."""
    study = run.get("study")
    if study is None:
        return run
    trials = [trial | {"origin": told(trial["origin"]), "kind": kind_of(trial["origin"])} for trial in study["trials"]]
    return run | {"study": study | {"trials": trials}, "kinds": KINDS}


def asset(name: str) -> str:
    """Returns the text of a file that the page is made of."""
    return files("lq_plugin.report").joinpath("assets", name).read_text(encoding="utf-8")
