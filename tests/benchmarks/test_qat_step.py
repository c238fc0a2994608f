"""The benchmark of a training step on small models: the promised JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import qat_step, qat_step_models
from benchmarks.peers import PeerError, process, training
from benchmarks.peers.environments import is_installed


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(qat_step_models.MODELS, "r20", (Small, (4, 3, 8, 8), (4,), 10))


@pytest.mark.parametrize("setting", ["W8A8", "LSQ"])
def test_json_has_the_promised_form(tmp_path: Path, setting: str) -> None:
    out = tmp_path / "out.json"
    implementations = ["lq pure", "lq native", "torch.ao"]
    arguments = [
        "--models",
        "r20",
        "--settings",
        setting,
        "--implementations",
        *implementations,
        "--rounds",
        "3",
        "--json",
        str(out),
    ]
    qat_step.main(arguments)
    rows = {row["implementation"]: row for row in json.loads(out.read_text())["results"]}
    assert set(rows) == {"float", *implementations}
    assert all((row["model"], row["setting"]) == ("r20", setting) for row in rows.values())
    assert rows["float"]["ratio"] == 1.0
    assert rows["lq pure"]["ratio"] > 0
    if setting == "LSQ":
        assert (rows["torch.ao"]["ratio"], rows["torch.ao"]["why"]) == (
            None,
            "its learned fake-quantizers are no part of its API",
        )
    else:
        assert rows["torch.ao"]["saved_mb"] > rows["float"]["saved_mb"]


@pytest.mark.parametrize(
    ("precision", "kept", "peer"),
    [("bf16-mixed", torch.bfloat16, "raises"), ("bf16-true", torch.bfloat16, ""), ("32-true", torch.float32, "")],
)
def test_precisions(tmp_path: Path, precision: str, kept: torch.dtype, peer: str) -> None:
    out = tmp_path / "out.json"
    words = ["--models", "r20", "--settings", "W8A8", "--implementations", "lq native", "torch.ao", "--rounds", "2"]
    qat_step.main([*words, "--precision", precision, "--json", str(out)])
    rows = {row["implementation"]: row for row in json.loads(out.read_text())["results"]}
    assert {row["precision"] for row in rows.values()} == {precision}
    assert rows["lq native"]["ratio"] > 0
    # The larger part is ReLU's output, in the precision's dtype.
    assert (rows["float"]["saved_mb"] * 1e6 < 4 * 8 * 36 * 4 + 4 * 3 * 64 * 4 + 8 * 27 * 4 + 2880 * 4) == (
        kept == torch.bfloat16
    )
    if peer:
        assert rows["torch.ao"]["ratio"] is None
        assert rows["torch.ao"]["why"].startswith(peer)


def test_a_precision_is_that_of_the_forward_pass() -> None:
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16), ("32-true", torch.float32)):
        step = qat_step_models.in_precision(qat_step_models.float_step("r20", "cpu"), precision)
        assert step.forward(step.batch[0]).dtype == dtype
        assert step.model.conv.weight.dtype == torch.float32
    step = qat_step_models.in_precision(qat_step_models.float_step("r20", "cpu"), "bf16-true")
    assert step.model.conv.weight.dtype == step.forward(step.batch[0]).dtype == torch.bfloat16


def test_saved_bytes_of_a_float_step() -> None:
    step = qat_step_models.float_step("r20", "cpu")
    weights = step.model.conv.weight.nbytes + step.model.fc.weight.nbytes
    batch, hidden, logits = 4 * 3 * 64 * 4, 4 * 8 * 36 * 4, 4 * 10 * 4
    # Images, weights, ReLU's output (flattened: the same storage), log-softmax, labels; cross-entropy keeps one total
    # weight.
    with_parameters, without = qat_step_models.saved_bytes(step)
    assert with_parameters - without == weights
    assert without == pytest.approx(batch + hidden + logits + 4 * 8, abs=64)


class Noted:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def seconds(self, clock: str) -> float:
        self.calls.append(f"{self.name} {clock}")
        return len(self.calls)


def test_every_round_runs_every_step_once() -> None:
    calls: list[str] = []
    times = qat_step.interleaved({name: Noted(name, calls) for name in "ab"}, rounds=2, warm_up=1, clock="cpu")  # type: ignore[misc]
    assert calls == ["a cpu", "b cpu", "b cpu", "a cpu", "a cpu", "b cpu"]
    assert times == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


class OfOneProcess:
    """A step that takes 1, 2, 3 seconds in the first, second, third pair, and half as long again here."""

    def __init__(self, tree: Path | None, started: list[str]) -> None:
        self.time = float(1 + len(started) // 2) * (1.5 if tree is None else 1.0)
        started.append("here" if tree is None else "there")

    def seconds(self, clock: str) -> float:
        return self.time

    def close(self) -> None:
        self.time = -1.0


def test_builds_are_compared_over_fresh_processes() -> None:
    options = qat_step.parse(["--beside", "HEAD", "--processes", "3", "--rounds", "2"])
    options.tree, started = Path(), []
    row = qat_step.compare(lambda tree: OfOneProcess(tree, started), options)
    assert started == ["here", "there", "there", "here", "here", "there"]
    assert row["medians"] == {"here": [1.5, 3.0, 4.5], "HEAD": [1.0, 2.0, 3.0]}
    assert (row["ratio"], row["low"], row["high"]) == (1.5, 1.5, 1.5)
    # By hand, the inclusive method: positions 0.75 and 2.25 of [1, 2, 4, 8].
    assert qat_step.quartiles([1.0, 2.0, 4.0, 8.0]) == [1.75, 3.0, 5.0]
    with pytest.raises(SystemExit):
        qat_step.parse(["--processes", "0"])


@pytest.mark.slow
def test_a_build_over_itself(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--models", "r20", "--settings", "W8A8", "--implementations", "lq native", "torch.ao", "--rounds", "1"]
    qat_step.main([*words, "--beside", "HEAD", "--processes", "2", "--json", str(out)])
    (row,) = json.loads(out.read_text())["results"]
    assert [len(medians) for medians in row["medians"].values()] == [2, 2]
    assert 0.2 < row["low"] <= row["high"] < 5


@pytest.mark.slow
def test_a_peers_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "require", lambda names: None)
    monkeypatch.setattr(process, "python", lambda name: Path(sys.executable))
    with pytest.raises(PeerError, match="No module named 'benchmarks.peers.nobody_training'"):
        training.PeerStep("nobody", "", "r20", "W8A8", 1)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("brevitas"), reason="Brevitas: python -m benchmarks.peers install brevitas")
def test_brevitas_takes_its_turn() -> None:
    step = training.PeerStep("brevitas", "learned", "r20", "W8A8", 1)
    assert step.seconds("wall") > 0
    total, without = step.saved()
    # More than the float step of ResNet-20 keeps.
    assert total > without > 196e6
    step.close()
    assert step.process.returncode == 0
