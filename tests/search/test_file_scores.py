"""`score=file`: the plans of a front as files of the target, evaluated in its runtime."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lq_plugin import PTQ
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.search import SearchConfig, search
from lq_plugin.search.study.result import FILES

from .conftest import CPU

pytest.importorskip("onnxruntime")

SPACE = {"weight": {"bit_widths": [2, 8], "granularities": ["per_channel"]}, "input": "uint8 affine"}


def run(model: DigitsCNN, folder: Path, **options: Any) -> Any:
    given = {"target": "onnx", "score": "file", "output_dir": folder, "seeds": 0} | options
    return search(
        model, DigitsDataModule(batch_size=120), SPACE, "val/acc", 4, trainer=CPU, calibration_batches=1,
        progress=False, **given,
    )  # fmt: skip


def check_that_ptq_scores_the_same(model: DigitsCNN, result: Any, folder: Path) -> None:
    """A plan of the front, read again: it names its target, and PTQ scores what the trial did."""
    candidate = result.front[-1]
    ptq = PTQ(folder / "plans" / candidate.file_name, calibration_batches=1, seed=0)
    assert ptq.plan.target == "onnx"
    trainer = CPU(callbacks=[ptq], logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.validate(model, datamodule=DigitsDataModule(batch_size=120), verbose=False)
    assert metrics["val/acc"] == candidate.metric


@pytest.mark.slow
def test_each_plan_of_the_front_has_a_file_and_its_scores(model: DigitsCNN, tmp_path: Path) -> None:
    result = run(model, tmp_path)
    check_that_ptq_scores_the_same(copy.deepcopy(model), result, tmp_path)
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert len(rows) == len(result.front) > 0
    for row, candidate in zip(rows, result.front, strict=True):
        path = tmp_path / "files" / f"{Path(candidate.file_name).stem}.onnx"
        assert int(row["file_bytes"]) == path.stat().st_size
        # At two bits ties of the integer sums decide a few of the 360 images.
        least = min(rule.weight.bit_width for rule in candidate.plan.rules)
        assert float(row["file/val/acc"]) == pytest.approx(candidate.metric, abs=0.01 if least == 8 else 0.03)
        assert 0 < float(row["file_ms"]) < 1000
    smallest, largest = (int(row["file_bytes"]) for row in (rows[0], rows[-1]))
    assert smallest < largest
    console = Console(record=True, width=200)
    console.print(result.table())
    text = console.export_text()
    assert "file val/acc" in text
    assert f"{int(rows[0]['file_bytes']):,}" in text
    # The same command again scores nothing anew.
    before = dict(result.study.user_attrs[FILES])
    assert run(model, tmp_path).study.user_attrs[FILES] == before


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_seen(
    model: DigitsCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lq_plugin.export.target import TARGETS

    original = type(TARGETS["onnx"]).open

    def turned(self: Any, *args: Any) -> Any:
        reader = original(self, *args)
        return reader._replace(run=lambda *xs: [-y for y in reader.run(*xs)])

    monkeypatch.setattr(type(TARGETS["onnx"]), "open", turned)
    result = run(model, tmp_path)
    scores = result.study.user_attrs[FILES]
    best = result.front[-1]
    assert scores[str(best.number)]["file/val/acc"] < best.metric / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "files"}, "score is 'model' or 'file', got 'files'"),
        ({"score": "file"}, "score='file' needs a target that writes files: .*onnx.*; got target=None"),
        ({"score": "file", "target": "xnor"}, "score='file' needs a target that writes files: .*got target='xnor'"),
        ({"score": "file", "target": "onnx"}, "score='file' needs output_dir"),
        ({"score": "file", "target": "onnx", "fidelity": [{"batches": 1}, {}]}, "it is for fidelity=None"),
    ],
)
def test_what_cannot_be_scored_is_said_first(model: DigitsCNN, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        SearchConfig(model, DigitsDataModule(), SPACE, "val/acc", **options)
