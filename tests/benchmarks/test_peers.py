"""Peers of the accuracy benchmark: what is refused, what is asked of them, and what their rows say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ptq_accuracy
from benchmarks.peers import PEERS, PeerError, Request, environments, measure_peers, rows, run_peer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    return tmp_path


def test_missing_peers_are_named_with_the_command_that_installs_them(folder: Path) -> None:
    with pytest.raises(
        SystemExit,
        match=r"aimet and brevitas are not installed; run\s+python -m benchmarks.peers install aimet brevitas",
    ):
        ptq_accuracy.parse(["--peers", "aimet", "brevitas"])


def test_an_environment_of_other_versions_is_not_taken(folder: Path) -> None:
    (folder / "aimet").mkdir()
    (folder / "aimet" / "installed.txt").write_text("aimet-torch==1.0.0\n")
    with pytest.raises(PeerError, match="aimet is not installed"):
        environments.require(["aimet"])


def test_a_peer_that_fails_says_what_it_wrote(folder: Path) -> None:
    # This interpreter lacks the peer's packages.
    (folder / "brevitas" / "bin").mkdir(parents=True)
    (folder / "brevitas" / "bin" / "python").symlink_to(sys.executable)
    (folder / "brevitas" / "installed.txt").write_text(environments._requirements("brevitas"))
    with pytest.raises(PeerError, match=r"(?s)brevitas failed at W4A8 with exit code 1:.*No module named '\w+'"):
        run_peer("brevitas", "W4A8", weights=folder / "none.safetensors", data=folder)


@pytest.mark.parametrize(
    ("change", "message"), [({"setting": "W4"}, "'W3A8', got 'W4'"), ({"iterations": 0}, "at least 1, got 0")]
)
def test_requests_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**{"weights": "a", "data": "b", "setting": "W3A8"} | change)


def test_rows_average_seeds_with_disjoint_calibration_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, tuple[int, int], int]] = []

    def answer(name: str, setting: str, **options: Any) -> dict[str, Any]:
        asked.append((options["iterations"], options["calibration"], options["seed"]))
        accuracy = 80.0 + options["seed"] + options["iterations"] / 1000
        return {
            "accuracy": accuracy,
            "seconds": 10.0 + options["seed"],
            "forward_pass_seconds": 0.5,
            "packages": {"torch": "2"},
        }

    monkeypatch.setattr(rows, "run_peer", answer)
    (row,) = measure_peers(["brevitas"], ["W2A8"], weights=Path("w"), data=Path("d"), seeds=3, images=100, default=True)
    default = PEERS["brevitas"].default_iterations
    assert asked == [(n, (s * 100, s * 100 + 100), s) for n in (200, default) for s in range(3)]
    assert row["curve"] == [[200, 81.2, 11.0], [default, 82.0, 11.0]]
    assert (row["iterations"], row["accuracy"], row["accuracies"]) == (default, 82.0, [81.0, 82.0, 83.0])
    assert (row["bits"], row["rounding"], row["weight"]) == ("W2A8", "brevitas learned round", "int2 per_channel max")
