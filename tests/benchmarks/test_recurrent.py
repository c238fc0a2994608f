"""The benchmark of recurrent layers on two steps: the promised JSON."""

from __future__ import annotations

import json

from benchmarks import recurrent


def test_a_row_for_each_network(tmp_path):
    out = tmp_path / "out.json"
    recurrent.main(["--steps", "2", "--rounds", "1", "--json", str(out)])
    rows = json.loads(out.read_text())["results"]
    names = ["float", "cells", "loop", "w8", "w8a8", "all"]
    assert [(row["kind"], row["name"]) for row in rows] == [(kind, name) for kind in ("LSTM", "GRU") for name in names]
    assert all(row["ratio"] > 0 and row["milliseconds"] > 0 for row in rows)
