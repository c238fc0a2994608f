"""Files that others have edited, cut or named strangely: `lq-report` says what is wrong, and draws any name."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lq_plugin import plots
from lq_plugin.callbacks.monitor.loggers import Picture, Report
from lq_plugin.commands.report import report as lq_report
from lq_plugin.commands.report_sources import load_report, read_log
from lq_plugin.commands.sensitivity import as_table
from lq_plugin.errors import QuantizationError
from lq_plugin.report import ReportData, Series
from lq_plugin.report.page import render
from lq_plugin.search.sensitivity.measure import SensitivityTable
from lq_plugin.utilities.csv_text import to_csv
from lq_plugin.utilities.files import file_name
from tests.report.synthetic import deep_report, large_study

NAMES = ["[/red] [bold]", "$x^{$ \\frac", "=cmd|' /C calc'!A0", "n" * 300, "a/b\\c:d\u2028<b>&amp;"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "study.db"
    large_study(trials=10, layers=3, storage=f"sqlite:///{path}")
    return path


def test_a_database_of_something_else_is_refused_and_unchanged(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "customers.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table customers (name text)")
        connection.commit()
    before = path.read_bytes()
    assert lq_report([str(path), "--no-pictures"]) == 2
    assert "is no storage of Optuna: it has no table of studies" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["customers.db"]


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_study_is_only_read(database: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "study.db"
    shutil.copy(database, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"pragma journal_mode={mode}")
    before = path.read_bytes()
    path.chmod(0o444)
    assert load_report(path).study is not None
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]


def test_what_a_running_search_has_just_written_is_read(database: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    shutil.copy(database, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma journal_mode=wal")
        connection.execute("update studies set study_name = 'renamed'")
        connection.commit()
        assert path.with_name("study.db-wal").exists(), "not yet in the database itself"
        assert load_report(path).title == "renamed"


@pytest.mark.parametrize(
    "statement",
    [
        "delete from trial_user_attributes",
        "update trial_user_attributes set value_json = '{' where key = 'metrics'",
        "update trial_user_attributes set value_json = '[1]' where key = 'plan'",
        "update study_user_attributes set value_json = '{\"mode\": 3}'",
        "update trial_params set distribution_json = 'x'",
        "drop table trial_values",
    ],
)
def test_an_edited_database_is_said_to_be_one(database: Path, tmp_path: Path, statement: str, capsys: Any) -> None:
    path = tmp_path / "study.db"
    shutil.copy(database, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    assert lq_report([str(path), "--no-pictures"]) == 2
    assert "lq-report: " in capsys.readouterr().err


def test_a_cut_database_is_said_to_be_one(database: Path, tmp_path: Path) -> None:
    content = database.read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9):
        path = tmp_path / f"{share}.db"
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(QuantizationError, match=rf"{share}\.db"):
            load_report(path)


@pytest.mark.parametrize(
    "rows",
    [
        b"step,loss\n0,0.5\n1,zero\n",
        b"step,loss\n0,0.5\n1,0.\xff\n",
        b"step,loss\n\xc2\xb2,0.5\n",
        b'step,loss\n0,"0.5\n1,0.4\n2,0.3',
    ],
)
def test_an_edited_log_names_the_line(tmp_path: Path, rows: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(rows)
    with pytest.raises(QuantizationError, match=r"cannot read .*metrics\.csv, line \d or the next: "):
        read_log(path)


def test_an_edited_or_cut_report_is_an_error_of_ours_or_drawn(tmp_path: Path) -> None:
    """Each value of a report in turn becomes another one; what can still be read has a page."""
    text = deep_report(layers=3, width=8).to_json()
    draw, refused = random.Random(0), 0
    for _ in range(40):
        content = json.loads(text)
        node: Any = content
        while isinstance(node, dict | list) and node:
            parent, key = node, draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
        parent[key] = draw.choice([None, -1, "x", [], {}, 1e400, True])
        cut = text[: draw.randrange(len(text))]
        with pytest.raises(QuantizationError):
            ReportData.from_json(cut)
        try:
            render(ReportData.from_json(json.dumps(content)))
        except QuantizationError:
            refused += 1
    assert 5 < refused < 40


@pytest.mark.parametrize(
    "damaged", [{"title": "a\ud800"}, {"title": "a", "notes": ["\udc80"]}, {"title": "a", "provenance": {"\udc80": ""}}]
)
def test_half_a_character_is_no_text(damaged: dict[str, Any]) -> None:
    content = json.loads(ReportData("a").to_json()) | damaged
    with pytest.raises(QuantizationError, match=r"must be text, got '"):
        ReportData.from_json(json.dumps(content))
    assert ReportData.from_json(json.dumps(content | {"title": "\U0001f600", "notes": [], "provenance": {}})).title


def test_figures_that_cannot_be_drawn_are_an_error_of_ours(tmp_path: Path, capsys: Any) -> None:
    small = deep_report(layers=3, width=8)
    assert small.model is not None
    training = [Series("train/loss", [1, 2, 3], [0.5])]
    path = replace(small, model=replace(small.model, training=training)).save(tmp_path / "report.json")
    assert lq_report([str(path)]) == 2
    assert "cannot be drawn, was its report edited?" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES, ids=["markup", "dollars", "formula", "long", "separators"])
def test_any_name_is_shown_drawn_and_written(name: str, tmp_path: Path) -> None:
    result = large_study(trials=6, layers=2, name=name)
    console = Console(record=True, width=500, file=io.StringIO())
    console.print(result.table())
    console.print(as_table(SensitivityTable("kl", {name: {"int4": 1.0, "int8": 0.5}})))
    shown = console.export_text()
    assert name in shown or "\u2028" in name
    assert plots.to_png(result.figure()).startswith(b"\x89PNG")
    picture = Picture("layer", name, b"")
    path = Path(tmp_path, picture.file)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert path.parent == tmp_path / "layer"
    table = Report(0, tables={"layers": [{"layer": name, "value": -1.0}]}).files()["layers.csv"].decode()
    ((_, value), (cell, number)) = list(csv.reader(io.StringIO(table, newline="")))
    assert (value, number) == ("value", "-1.0")
    assert cell == (f"'{name}" if name[0] == "=" else name)


def test_cells_that_would_be_formulas_are_text() -> None:
    given = ["=1", "+1", "-1", "@A1", "\tx", "-", "a=1", -1.5, None]
    rows = csv.reader(to_csv([{"x": value} for value in given], ["x"]).splitlines())
    assert [row[0] if row else "" for row in rows] == ["x", "'=1", "'+1", "'-1", "'@A1", "'\tx", "-", "a=1", "-1.5", ""]


def test_file_names_are_short_and_differ() -> None:
    assert len({file_name("n" * 300), file_name("n" * 301), file_name("n" * 299 + "m")}) == 3
    assert len(file_name("層" * 200).encode()) < 200
