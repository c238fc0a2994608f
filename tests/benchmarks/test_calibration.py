"""The calibration benchmark on a small net: the promised JSON, with every peer in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import calibration
from benchmarks.peers import PeerError, calibrating, environments, process
from lq_plugin.ranges.laboratory import COMPARED


def small(name: str, data: Path, batches: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return net.eval(), [torch.randn(4, 3, 8, 8) for _ in range(batches)]


@pytest.mark.slow
def test_json_has_the_promised_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "load", small)
    monkeypatch.setattr(calibration, "growth", lambda rounds: {})
    out = tmp_path / "out.json"
    arguments = [
        "--models",
        "r20",
        "--peers",
        "torchao",
        "onnxruntime",
        "aimet",
        "--rounds",
        "1",
        "--batches",
        "2",
        "--json",
        str(out),
    ]
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    calibration.main(arguments)
    content = json.loads(out.read_text())
    (result,) = content["results"]
    assert (result["model"], result["batches"]) == ("r20", 2)
    assert list(result["over_forward_pass"]) == [
        "lq collect", *(f"lq {name}" for name in COMPARED), "lq all",
        "torchao pt2e", "onnxruntime MinMax", "onnxruntime Entropy", "onnxruntime Percentile",
    ]  # fmt: skip
    assert list(result["missing"]) == ["aimet"]
    assert "python -m benchmarks.peers install aimet" in result["missing"]["aimet"]
    assert all(row["ratio"] > 0 for row in result["over_forward_pass"].values())
    assert {"torchao", "onnxruntime"} <= set(content["environment"]["packages"])


def test_sizes_that_double_are_timed_each() -> None:
    calls: list[int] = []
    rows = calibration.doubling(lambda size: lambda: calls.append(size), [1, 2, 4], rounds=3)
    assert [size for size, _ in rows] == [1, 2, 4]
    assert sorted(calls) == [1] * 4 + [2] * 4 + [4] * 4


def test_a_peer_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "require", lambda names: None)
    monkeypatch.setattr(process, "python", lambda name: Path(sys.executable))
    with pytest.raises(PeerError, match="No module named 'benchmarks.peers.nobody_calibration'"):
        calibrating.PeerCalibration("nobody", "r18", tmp_path, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["aimet", "brevitas"])
def test_peers_find_ranges(peer: str, tmp_path: Path) -> None:
    if not environments.is_installed(peer):
        pytest.skip(f"python -m benchmarks.peers install {peer}")
    made = calibrating.PeerCalibration(peer, "r18", tmp_path, 1, 1)
    for name, call in made.calls().items():
        assert name.startswith(peer)
        assert call() is None
    made.close()
    assert made.process.returncode == 0
