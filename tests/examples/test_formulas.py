"""examples/formulas.md: every name exists, every plan can be written, and the code itself names the paper."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

from lq_plugin import PTQ, QuantPlan
from lq_plugin.intent.formats import FORMATS, RANGES
from lq_plugin.ptq.phases import PHASES
from tests.examples.conftest import EXAMPLES

PAGE = (EXAMPLES / "formulas.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if not set(row[0]) <= {"-"} and row[2] != "code"]
SYMBOL = re.compile(r"`(lq_plugin(?:\.\w+)+)`")


def found(path: str) -> tuple[Any, Any]:
    """The symbol, and the module that it is defined in."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value, inspect.getmodule(value)
    raise ImportError(path)


def test_the_page_has_every_family() -> None:
    assert {name for name in PHASES if f"`{name}`" in PAGE} | {"calibrate"} == set(PHASES)
    assert len(ROWS) > 45
    for name in (*FORMATS, *RANGES):
        assert name == "int" or name in PAGE, name
    for word in ("per_tensor", "per_channel", "group16:4", "stochastic", "AdaRound", "BRECQ", "xnor", "effective bits"):
        assert word in PAGE, word


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: row[2].strip("`").removeprefix("lq_plugin.") + " " + row[0].strip("`")
)
def test_a_row_is_true(row: list[str]) -> None:
    _, _, code, source = row
    (path,) = SYMBOL.findall(code)
    symbol, module = found(path)
    text = (inspect.getdoc(symbol) or "") + (inspect.getdoc(module) or "")
    assert inspect.getdoc(symbol), f"{path} has no docstring"
    for number in re.findall(r"\d{4}\.\d{5}", source):
        assert number in text, f"{path} does not name {number}"
    if "GTC" in source:
        assert "GTC 2017" in text
    for place in places(source):  # in the paper
        assert place in places(inspect.getsource(module)), f"{path} does not name {place[0]} {place[1]}"


def places(text: str) -> set[tuple[str, str]]:
    """Equations, sections and algorithms that a text names, each as kind and number; "eqs. 1-3 and 5" are four."""
    kinds = {"eq": "equation", "equation": "equation", "section": "section", "algorithm": "algorithm"}
    several = r"\d+(?:\.\d+)*(?:(?:-| and |, )\d+(?:\.\d+)*)*"
    found = set()
    for kind, numbers in re.findall(rf"\b(eq|equation|section|algorithm)s?\.? ({several})", text):
        for first, last in re.findall(r"(\d+(?:\.\d+)*)(?:-(\d+))?", numbers):
            whole = [str(number) for number in range(int(first), int(last) + 1)] if last else [first]
            found |= {(kinds[kind], number) for number in whole}
    return found


def test_places_are_read() -> None:
    assert places("eqs. 1-3 and 5, section 2.1; (eq. 6)") == {
        *(("equation", number) for number in "12356"),
        ("section", "2.1"),
    }


@pytest.mark.parametrize("plan", sorted({match[1] for row in ROWS if (match := re.fullmatch(r"`(.+)`", row[0]))}))
def test_what_is_to_be_written_can_be_written(plan: str) -> None:
    if plan in PHASES:
        after = "calibrate" in PHASES[plan].after or plan.endswith("correct") or plan.startswith("correct")
        assert PTQ("w4a8", phases=["calibrate", plan] if after else [plan, "calibrate"]).phases
    else:
        assert QuantPlan.parse(plan).rules
