"""Latency as a cost: one table for all workers of a study, bounds, and what whole models take."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path
from typing import Any

import optuna
import pytest

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import ExportError, QuantizationError
from lq_plugin.export.target import Target
from lq_plugin.search import SearchResult, search
from lq_plugin.search.space.space import Space
from lq_plugin.search.study.latency import TABLE, latency_options, pairs

from .conftest import CPU

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

#: Two layers with a choice: an export takes most of a second.
SPACE = {
    "weight": "float",
    "rules": [
        {"match": "head.2", "weight": ["int8 per_channel mse", "int4 per_channel mse"], "input": "uint8 affine mse"},
        {"match": "mix.0", "weight": ["int8 per_channel mse", "float"]},
    ],
}


def run(model: DigitsCNN, n_trials: int, **options: Any) -> SearchResult:
    given = {
        "space": SPACE,
        "metric": "val/acc",
        "trainer": CPU,
        "calibration_batches": 1,
        "progress": False,
        "seeds": 2,
    } | options
    return search(model, DigitsDataModule(batch_size=120), n_trials=n_trials, latency={"rounds": 2}, **given)


@pytest.mark.slow
def test_every_trial_has_the_latency_of_its_plan(
    model: DigitsCNN, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result = run(model, 4, cost="latency", output_dir=tmp_path)
    # The float model, and each layer float and with both of its choices, one of which is float.
    assert re.search(r"latency: 2 layers: 6 models to time, 0 known; onnxruntime ", caplog.text)
    assert "latency: exported 6 of 6" in caplog.text
    assert "latency: timed 6 models, rounds 5 of 5" in caplog.text
    table = result.study.user_attrs[TABLE]
    assert set(table["layers"]) == {"head.2", "mix.0"}
    for candidate in result.candidates:
        plan = {rule.match: str(rule.weight) for rule in candidate.plan.rules}
        changes = {"head.2": f"int{4 if 'int4' in plan['head.2'] else 8} per_channel / 8 bit"}
        changes |= {"mix.0": "int8 per_channel / float"} if "int8" in plan.get("mix.0", "") else {}
        rows = table["layers"]
        want = table["float_model"] + sum(rows[name][kind] - rows[name]["float"] for name, kind in changes.items())
        assert candidate.cost == candidate.metrics["latency"] == pytest.approx(max(want, 0.0))
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in result.table().columns}
    assert columns["latency ms/sample"] == ["", *(f"{c.cost:.3g}" for c in reversed(result.front))]
    assert [float(cell) > 0 for cell in columns["measured ms/sample"]] == [True] * (1 + len(result.front))
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert rows
    assert all(float(row["measured_latency"]) > 0 for row in rows)
    # A second run predicts with the same numbers, whatever it would measure now.
    again = run(model, 5, cost="latency", output_dir=tmp_path)
    assert again.study.user_attrs[TABLE] == table


def test_the_table_of_a_search_without_latency_has_no_column_for_it(model: DigitsCNN) -> None:
    found = search(
        model, DigitsDataModule(batch_size=120), SPACE, "val/acc", n_trials=2, trainer=CPU, calibration_batches=1,
        progress=False,
        storage=optuna.storages.InMemoryStorage(),
    )  # fmt: skip
    assert [str(column.header) for column in found.table().columns] == [
        "trial",
        "val/acc",
        "effective bits",
        "bytes",
        "plan from",
    ]


def test_a_bound_that_no_plan_keeps_is_refused(model: DigitsCNN) -> None:
    with pytest.raises(QuantizationError, match="no plan of the space keeps 'latency <= -1': the smallest has"):
        run(model, 3, constraints="latency <= -1", storage=optuna.storages.InMemoryStorage())


def test_unknown_options_are_named_before_anything_is_loaded(model: DigitsCNN) -> None:
    with pytest.raises(
        QuantizationError, match=r"options of latency: .*'runtimes'.*valid: runtime, batch, threads, rounds, cache"
    ):
        search(model, None, SPACE, "val/acc", latency={"runtimes": "onnxruntime"})


def test_pairs_are_those_of_one_layer(model: DigitsCNN) -> None:
    from lq_plugin.model.survey import Survey

    survey = Survey.of(model)
    found = list(pairs(Space.parse(SPACE).bind(survey.infos(), survey.others())))
    assert {name for plan in found for name in plan} >= {"head.2", "mix.0"}
    assert all(len(plan) == 1 for plan in found)
    head = [(str(plan["head.2"].weight), str(plan["head.2"].input)) for plan in found if "head.2" in plan]
    assert head == [("int8 per_channel mse", "uint8 affine mse"), ("int4 per_channel mse", "uint8 affine mse")]


@pytest.mark.parametrize(
    ("target", "runtime"),
    [
        (None, "onnxruntime"), ("onnx", "onnxruntime"), ("openvino", "openvino"), ("executorch", "executorch"),
        ("litert", "ai_edge_litert"),
    ],
)  # fmt: skip
def test_latency_is_measured_in_the_runtime_of_the_target(
    target: str | None, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Target, "need_packages", lambda self, what, name=None: asked.append((self.name, name)))
    assert latency_options(None, target).runtime == runtime
    # One that is named is taken, whatever the target.
    assert latency_options({"runtime": "onnxruntime", "batch": 3}, target).runtime == "onnxruntime"
    writer = {None: "onnx", "openvino": "onnx"}.get(target, target)
    assert asked == [(writer, runtime), ("onnx", "onnxruntime")]


@pytest.mark.parametrize("target", ["gguf", "mlx", "tensorrt", "compressed-tensors"])
def test_targets_whose_layers_cannot_be_timed_are_refused(target: str, model: DigitsCNN) -> None:
    reason = f"no layer of a file of {target} can be timed alone"
    with pytest.raises(ExportError, match=f"{reason}.*score='file'.*executorch"):
        latency_options({"batch": 2}, target)
    with pytest.raises(QuantizationError, match=reason):
        run(model, 1, cost="latency", target=target)
