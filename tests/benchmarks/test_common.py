"""Interleaving, ratios, and the JSON that results are written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import common


def test_functions_take_turns_and_every_second_round_runs_backwards() -> None:
    calls: list[str] = []
    times = common.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warm_up=1)
    assert "".join(calls) == "abccbaabccba"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_is_of_medians_and_its_spread_of_pairs() -> None:
    times = {"new": [2.0, 9.0, 4.0], "old": [1.0, 3.0, 8.0]}
    assert common.ratio(times, "new", "old") == {"ratio": pytest.approx(4 / 3), "low": 0.5, "high": 3.0}


def test_results_are_written_with_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["here/search.py", "--data", "my/data", "--faults", "--json=out.json", "--json", "out.json", "-x", "1"],
    )
    common.write_json(tmp_path / "out.json", {"float": 87.5}, packages=("no-such-package",))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["float"] == 87.5
    environment = content["environment"]
    assert environment["packages"]["no-such-package"] is None
    assert environment["packages"]["torch"]
    assert environment["threads"] >= 1
    assert environment["command"] == ["search.py", "--faults", "-x", "1"]
    assert environment["cpu"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_json(tmp_path / "out.json", {"accuracy": float("nan")})


def test_a_folder_that_is_missing_is_reported_before_the_work(tmp_path: Path) -> None:
    options = common.parser("x").parse_args(["--json", str(tmp_path / "none" / "out.json")])
    with pytest.raises(SystemExit, match="does not exist"):
        common.start(options)


def test_data_option_defaults_to_the_shared_folder() -> None:
    assert common.parser("x").parse_args([]).data == Path("../shared/data")
    assert not hasattr(common.parser("x", data=False).parse_args([]), "data")
