"""The accuracy benchmark on miniature data: the promised JSON, and rows that differ where they should."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import ptq_accuracy
from lq_plugin.demo.cifar10 import load_images, normalize
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.ranges.laboratory import COMPARED


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptq_accuracy, "CALIBRATION_IMAGES", 32)
    monkeypatch.setattr(ptq_accuracy, "BATCH_SIZE", 16)


@pytest.mark.slow
def test_json_has_the_promised_form(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = [
        "--data",
        str(data_folder),
        "--weights",
        "resnet8.safetensors",
        "--depth",
        "8",
        "--json",
        str(out),
        "--seeds",
        "2",
    ]
    ptq_accuracy.main([*arguments, "--bits", "W4A8", "W2A8", "--ranges", "minmax", "mse"])
    content = json.loads(out.read_text())
    assert 0.0 <= content["float"] <= 100.0
    assert content["test_images"] == 24
    assert [(row["bits"], row["range"]) for row in content["results"]] == [
        ("W4A8", "minmax"), ("W4A8", "mse"), ("W2A8", "minmax"), ("W2A8", "mse")
    ]  # fmt: skip
    for row in content["results"]:
        assert row["rounding"] == "nearest"
        assert row["accuracy"] == pytest.approx(sum(row["accuracies"]) / 2, abs=1e-3)
        assert row["seconds"] > row["forward_pass_seconds"] > 0
        assert (row["weight"], row["input"]) == ptq_accuracy.specs(row["bits"], row["range"])
    assert content["calibration"]["images"] == 32
    assert content["calibration"]["estimators"] == list(COMPARED)
    assert content["calibration"]["all_estimators_over_forward_pass"]["ratio"] > 1.0
    assert content["environment"]["threads"] >= 1
    assert "W2A8" in capsys.readouterr().out


def test_defaults_cover_every_width_and_estimator() -> None:
    options = ptq_accuracy.parse([])
    assert options.bits == ["W8A8", "W4A8", "W4A4", "W3A8", "W2A8"]
    assert options.ranges == list(COMPARED)
    assert options.test_images is None


def test_all_layers_are_quantized_with_the_row_s_specs(data_folder: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNet(8).eval()
    batches = list(normalize(load_images(data_folder, "train", 0, 32)[0]).split(16))
    before = copy.deepcopy(model.state_dict())
    result = ptq_accuracy.quantized(model, *ptq_accuracy.specs("W2A8", "mse"), batches)
    layers = dict(quantized_layers(result))
    assert list(layers) == [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for layer in layers.values():
        assert str(layer.weight_quantizer.spec) == "int2 per_channel mse"
        assert str(layer.input_quantizer.spec) == "uint8 affine mse"
        assert all(len(row.unique()) <= 4 for row in layer.quantized_weight())
    assert not quantized_layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_estimator_ranges_every_weight_and_input(data_folder: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNet(8).eval()
    batches = [normalize(load_images(data_folder, "train", 0, 16)[0])]
    channels = sum(m.weight.shape[0] for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    prepared = ptq_accuracy.quantized(model, "int4 per_channel", "uint4 affine", batches)
    assert ptq_accuracy.all_estimates(prepared, batches) == len(COMPARED) * (channels + 8)


def test_accuracy_is_the_share_of_right_predictions() -> None:
    images = torch.eye(10)[torch.arange(300) % 10]
    labels = torch.arange(300) % 10
    labels[:75] = (labels[:75] + 1) % 10
    assert ptq_accuracy.accuracy(torch.nn.Identity(), images, labels) == 75.0


@pytest.mark.slow
def test_learned_rounding_has_a_row_with_its_curve(data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--data", str(data_folder), "--weights", "resnet8.safetensors", "--depth", "8", "--json", str(out)]
    ptq_accuracy.main(
        [*arguments, "--bits", "W3A8", "--ranges", "mse", "--rounding", "brecq", "adaround", "--iterations", "2", "5"]
    )
    rows = json.loads(out.read_text())["results"]
    assert [(row["rounding"], row["range"]) for row in rows] == [
        ("brecq", "mse"),
        ("adaround", "mse"),
        ("nearest", "mse"),
    ]
    for row in rows[:2]:
        assert row["iterations"] == 5
        assert [point[0] for point in row["curve"]] == [2, 5]
        assert row["curve"][-1][1:] == [row["accuracy"], row["seconds"]]
        assert row["weight"] == "int3 per_channel mse"
