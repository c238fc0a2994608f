"""The benchmark of monitor and report page on a small fit: the promised JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import see
from lq_plugin.demo.resnet import CifarResNet


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:The '.*_dataloader' does not have many workers"
)
def test_json_has_the_promised_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(see, "LAYERS", 4)
    monkeypatch.setattr(see, "TRIALS", 5)
    monkeypatch.setattr(see, "BATCH", 8)
    monkeypatch.setattr(see, "CifarResNet", lambda depth: CifarResNet(8))
    out = tmp_path / "out.json"
    see.main(["--batches", "8", "--rounds", "1", "--json", str(out)])
    results = json.loads(out.read_text())
    assert (results["page"]["layers"], results["page"]["trials"]) == (4, 5)
    assert 10_000 < results["page"]["bytes"] < 5e6
    assert [row["plan"] for row in results["logs"]] == list(see.PLANS)
    for row in results["logs"]:
        assert row["per_100"] == row["log_over_step"] / 100
        assert row["start"] > 0
        assert row["end"] > 0
