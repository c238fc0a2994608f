"""The calibration benchmark on a small net: the promised JSON, with every peer in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import calibration
from lq_plugin.ranges.laboratory import COMPARED


def small(name: str, data: Path, batches: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return net.eval(), [torch.randn(4, 3, 8, 8) for _ in range(batches)]


def test_json_has_the_promised_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(calibration, "load", small)
    monkeypatch.setattr(calibration, "growth", lambda rounds: {})
    out = tmp_path / "out.json"
    calibration.main(["--models", "r20", "--rounds", "1", "--batches", "2", "--json", str(out)])
    content = json.loads(out.read_text())
    (result,) = content["results"]
    assert (result["model"], result["batches"]) == ("r20", 2)
    assert list(result["over_forward_pass"]) == [
        "lq collect", *(f"lq {name}" for name in COMPARED), "lq all",
        "torchao pt2e", "onnxruntime MinMax", "onnxruntime Entropy", "onnxruntime Percentile",
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in result["over_forward_pass"].values())
    assert {"torchao", "onnxruntime"} <= set(content["environment"]["packages"])


def test_sizes_that_double_are_timed_each() -> None:
    calls: list[int] = []
    rows = calibration.doubling(lambda size: lambda: calls.append(size), [1, 2, 4], rounds=3)
    assert [size for size, _ in rows] == [1, 2, 4]
    assert sorted(calls) == [1] * 4 + [2] * 4 + [4] * 4
