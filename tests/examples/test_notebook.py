"""Notebooks: their cells run in order, in a fresh folder, and what they end in is shown as HTML."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell as a kernel does; returns the value of its last expression, or None."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_there_is_one() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_a_whole_run(path: Path) -> None:
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [out for cell in cells(path) for out in cell["outputs"] if out["output_type"] == "error"]
    assert not {word for word in ("/home/", "/root/", "/tmp/") if word in path.read_text(encoding="utf-8")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as the notebook itself says
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_showed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(path):
        value = run_cell("".join(cell["source"]), names)
        shown = [out["data"] for out in cell["outputs"] if "data" in out]
        assert (value is None) == (not shown)
        if shown and "text/html" in shown[0]:
            html = "".join(shown[0]["text/html"])
            # The same columns; scores differ between processors.
            head = html[html.index("<thead>") : html.index("</thead>")]
            assert head in value._repr_html_()
