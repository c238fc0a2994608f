"""Runs that `lq-report` finds and refuses, and the files that it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from lq_plugin.commands.report import report as lq_report
from lq_plugin.commands.report_sources import load_report, read_log
from lq_plugin.errors import QuantizationError
from lq_plugin.report import ReportData, Series
from lq_plugin.report.pictures import write_pictures
from lq_plugin.search import study_report
from lq_plugin.search.shared.database import quiet
from tests.report.synthetic import deep_report, large_study

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small() -> ReportData:
    return deep_report(layers=3, width=8)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "study.db"
    large_study(trials=20, layers=4, storage=f"sqlite:///{path}")
    return path


def test_a_file_a_folder_a_database_and_a_url(small: ReportData, database: Path, tmp_path: Path) -> None:
    path = small.save(tmp_path / "logs" / "version_0" / "quant" / "report.json")
    assert load_report(path) == small
    assert load_report(tmp_path) == small
    of_file = load_report(database)
    assert of_file == load_report(f"sqlite:///{database}", "large") == load_report(database.parent)
    assert of_file.study is not None
    in_memory = study_report(large_study(trials=20, layers=4)).study
    assert in_memory is not None
    # The database does not know what the float model scores.
    assert of_file.study == replace(in_memory, float_metric=None, float_bytes=None)
    assert len(of_file.study.trials) == 20


def test_a_search_keeps_its_float_metric(database: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    os.link(database, folder / "study.db")
    result = large_study(trials=20, layers=4)
    assert load_report(folder).study.float_metric is None  # type: ignore[union-attr]
    study_report(result).save(folder / "report.json")
    found = load_report(folder).study
    assert found is not None
    assert (found.float_metric, found.float_bytes) == (0.948, 4_000_000)


def test_a_run_and_its_search_are_one_page(small: ReportData, database: Path, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    os.link(database, tmp_path / "search" / "study.db")
    small.save(tmp_path / "old" / "report.json")
    newer = ReportData("newer", small.model)
    os.utime(newer.save(tmp_path / "new" / "report.json"), (2e9, 2e9))
    found = load_report(tmp_path)
    assert found.model == small.model
    assert found.study is not None
    assert found.title == "newer"
    assert found.notes == ["The newest of 2 runs in this folder."]


def test_the_log_beside_a_report_is_its_training(small: ReportData, tmp_path: Path) -> None:
    assert small.model is not None
    log = tmp_path / "metrics.csv"
    log.write_text(
        "epoch,step,train/loss,val/acc,once\n0,0,2.5,,\n0,5,1.25,,\n0,9,nan,0.5,7\n1,19,,0.75,\n1,oops,1,1,1\n"
    )
    assert read_log(log) == [Series("train/loss", [0, 5], [2.5, 1.25]), Series("val/acc", [9, 19], [0.5, 0.75])]
    silent = replace(small, model=replace(small.model, training=[]))
    silent.save(tmp_path / "quant" / "report.json")
    assert load_report(tmp_path).model.training == read_log(log)  # type: ignore[union-attr]


def test_long_logs_are_thinned(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss\n" + "".join(f"{i},{i / 7}\n" for i in range(5000)))
    (series,) = read_log(log)
    assert len(series.steps) <= 400
    assert series.steps[0] == 0


def test_what_is_no_report_is_refused(tmp_path: Path, database: Path) -> None:
    with pytest.raises(QuantizationError, match=r"there is no '/no/such'"):
        load_report("/no/such")
    with pytest.raises(QuantizationError, match="neither report.json nor study.db"):
        load_report(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(QuantizationError, match="no report of lq_plugin"):
        load_report(tmp_path / "other.json")
    with pytest.raises(QuantizationError, match="there is no database"):
        load_report("sqlite:////no/such.db")
    with pytest.raises(QuantizationError, match="no study 'larg'.*Did you mean 'large'"):
        load_report(database, "larg")
    foreign = tmp_path / "foreign.db"
    with quiet():
        for name in ("a", "b"):
            optuna.create_study(study_name=name, storage=f"sqlite:///{foreign}")
    with pytest.raises(QuantizationError, match="2 studies: a, b; choose one with --study"):
        load_report(foreign)
    with pytest.raises(QuantizationError, match="not made by lq_plugin"):
        load_report(foreign, "a")


@pytest.mark.slow
def test_the_command(small: ReportData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small.save(tmp_path / "run" / "report.json")
    assert lq_report([str(path.parent)]) == 0
    assert (path.parent / "report.html").is_file()
    assert {p.stem for p in (path.parent / "figures").glob("*.svg")} >= {"bits", "sqnr", "layer_head"}
    assert str(path.parent / "report.html") in capsys.readouterr().out
    assert lq_report([str(path), str(path), "-o", str(tmp_path / "both.html"), "--no-pictures"]) == 0
    assert not (tmp_path / "figures").exists()
    assert (tmp_path / "both.html").read_text().count("<title>Deep, report.json · Deep, report.json</title>") == 1
    other = small.save(tmp_path / "second" / "report.json")
    assert lq_report([str(path.parent), str(other.parent), "-o", str(tmp_path / "both.html"), "--no-pictures"]) == 0
    assert "<title>Deep, run · Deep, second</title>" in (tmp_path / "both.html").read_text()
    assert lq_report(["/no/such"]) == 2
    assert "lq-report: there is no '/no/such'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lq_report(["a", "b", "c"])


@pytest.mark.slow
def test_pictures_of_every_figure(small: ReportData, tmp_path: Path) -> None:
    study = study_report(large_study(trials=12, layers=4))
    written = write_pictures(ReportData("both", small.model, study.study), tmp_path, max_layers=1)
    names = {"bits", "sqnr", "layer_body.1", "training", "pareto", "hypervolume", "parallel", "best_bits", "importance"}
    assert {path.stem for path in written} == names
    for path in written:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    assert write_pictures(ReportData("none"), tmp_path / "none") == []
    assert small.model is not None
    still = replace(small.model, training=[Series("quant/weight_coverage", [0, 5], [1.0, 1.0])])
    assert "training" not in {
        path.stem for path in write_pictures(ReportData("still", still), tmp_path / "still", max_layers=0)
    }


def test_names_that_are_markup_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ReportData("x").save(tmp_path / "[red]folder[" / "report.json")
    assert lq_report([str(tmp_path / "[red]folder["), "--no-pictures"]) == 0
    assert "[red]folder[" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "arguments", "said"),
    [
        ("report", ["nowhere"], "lq-report: there is no 'nowhere'"),
        ("explain", ["w99", "some.module:Net"], "lq-explain: cannot read the plan 'w99'"),
        ("explain", ["plan.yml", "some.module:Net"], "lq-explain: cannot open the plan file 'plan.yml'"),
    ],
)
def test_commands_answer_before_anything_heavy_is_imported(entry: str, arguments: list[str], said: str) -> None:
    heavy = "[name for name in ('torch', 'lightning', 'matplotlib', 'optuna', 'numpy') if name in sys.modules]"
    code = (
        f"import sys; from lq_plugin.commands.{entry} import {entry}; code = {entry}({arguments!r}); "
        f"print(code, {heavy})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "2 []\n"
    assert said in done.stderr
