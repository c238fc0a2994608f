"""`benchmarks.targets`: rows of files that are run, and runtimes that are not there."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import targets, targets_models
from benchmarks.targets_models import CASES, Case, Data


def test_every_case_names_a_target_and_its_runtime():
    from lq_plugin.export.target import TARGETS

    for case in CASES:
        for place in case.targets:
            name, _, runtime = place.partition(":")
            assert name in TARGETS, f"{case.model}: {name}"
            assert not runtime or runtime in TARGETS[name].runtimes


def test_plans_leave_out_what_a_runtime_computes_otherwise():
    (case,) = (case for case in CASES if (case.model, case.plan) == ("resnet20", "W8A8"))
    rules = {place: [rule.match for rule in case.quant_plan(*place).rules] for place in
             [("executorch", None), ("onnx", "onnxruntime"), ("onnx", "openvino")]}  # fmt: skip
    assert rules["executorch", None] == ["*", "layer*.add_0", "mean_0", "linear"]
    assert rules["onnx", "onnxruntime"] == ["*", "layer*.add_0"]
    assert rules["onnx", "openvino"] == ["*"]


@pytest.mark.slow
def test_a_row_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(targets, "ROUNDS", 3)
    monkeypatch.setattr(targets, "CALLS", 2)
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32)
    model = targets_models.MobileNet().eval()
    data = Data([x[:32]], x, torch.zeros(64, dtype=torch.long))
    case = Case("mobilenet", "W8A8", "int8 per_channel", ("onnx:onnxruntime",))
    row = targets.measure(case, "onnx:onnxruntime", model, data, tmp_path)
    assert row["bytes"] == next(tmp_path.glob("*.onnx")).stat().st_size
    assert row["agreement"] > 0.9
    assert row["within_one_step"] > 0.9
    assert row["products"] == 15
    assert row["accuracy"] == pytest.approx(row["model_accuracy"], abs=5)
    assert row["over_float"] > 0


def test_a_missing_runtime_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    case = Case("mobilenet", "W8A8", "int8 per_channel", ("onnx:openvino",))
    row = targets.measure(case, "onnx:openvino", targets_models.MobileNet(), Data([], torch.zeros(1), None), tmp_path)
    assert "needs openvino, which is not installed" in row["missing"]
    assert json.dumps(row)
    assert targets.show([row]).row_count == 1


def test_files_of_convolutions_are_within_a_step():
    """What the page says of them is compared in `test_tables_kept`."""
    rows = json.loads((Path(targets.__file__).parent / "results/targets.json").read_text(encoding="utf-8"))["results"]
    for row in rows:
        if row["model"] != "llama":
            assert row["within_one_step"] > 0.99
            assert row["target"] == "tensorrt" or row["integer"] == row["products"]
