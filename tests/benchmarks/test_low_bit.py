"""The low-bit training benchmark on miniature data: the promised JSON, and formats that really were in force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import low_bit
from lq_plugin import prepare
from lq_plugin.demo.resnet import CifarResNet, LitClassifier


def test_json_has_the_promised_form(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(low_bit, "HELD_OUT", 32)
    arguments = [
        "--data",
        str(data_folder),
        "--weights",
        "resnet8.safetensors",
        "--depth",
        "8",
        "--epochs",
        "1",
        "--json",
        str(out),
    ]
    low_bit.main([*arguments, "--formats", "float", "bwn", "ttq", "--tune"])
    content = json.loads(out.read_text())
    rows = {row["format"]: row for row in content["results"]}
    assert list(rows) == ["float", "bwn", "ttq"]
    assert content["float"] == rows["float"]["accuracy"]
    for row in rows.values():
        assert 0.0 <= row["accuracy"] <= 100.0
        assert row["epochs"] == 1
        assert row["seconds"] > 0
        assert row["split"] == "val"
    assert rows["float"]["effective_bits"] == 32
    assert 1.0 < rows["bwn"]["effective_bits"] < 1.2
    assert 2.0 < rows["ttq"]["effective_bits"] < 2.05
    assert content["environment"]["threads"] >= 1


@pytest.mark.parametrize("name", low_bit.FORMATS)
def test_first_and_last_layer_stay_float(name: str) -> None:
    model = LitClassifier(CifarResNet(8))
    ledger = prepare(model, low_bit.recipe_of(name).plan)
    layers = [entry.name for entry in ledger if entry.kind in ("Conv2d", "Linear")]
    float_layers = [entry.name for entry in ledger if entry.kind in ("Conv2d", "Linear") and not entry.plan.weight]
    assert float_layers == [layers[0], layers[-1]] == ["net.conv1", "net.linear"]
