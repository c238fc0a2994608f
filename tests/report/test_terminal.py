"""Tables for a terminal."""

from __future__ import annotations

import torch
from torch import nn

import lq_plugin
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.fidelity import layer_fidelity
from lq_plugin.report.terminal import MAX_ROWS, summary


def test_every_layer_has_its_line_and_the_totals_are_those_of_the_cost() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    ledger = lq_plugin.prepare(net, {"rules": [{"match": "0", "weight": "int4"}]})
    assert "SQNR" not in summary(cost(net), [], ledger, "nothing measured", width=100)
    rows = layer_fidelity(net)
    lines = summary(cost(net), rows, ledger, "after", {"val/acc": 0.91234}, width=100).splitlines()
    first = next(line for line in lines if line.strip().startswith("0 "))
    assert f"{rows[0].sqnr_db:.1f} dB" in first
    assert "int4" in first
    second = next(line for line in lines if line.strip().startswith("2 "))
    assert "float" in second
    assert "32.00" in second
    total = next(line for line in lines if "whole model" in line)
    assert f"{cost(net).bytes:,}" in total
    assert lines[-1] == "val/acc 0.9123"


def test_of_many_layers_the_largest_are_shown_in_their_order() -> None:
    net = nn.Sequential(*(nn.Linear(4 + i % 2, 4 + (i + 1) % 2) for i in range(60)))
    net[30] = nn.Linear(4, 99)
    ledger = lq_plugin.prepare(net, "w4")
    text = summary(cost(net), layer_fidelity(net), ledger, "many", width=100)
    assert f"{60 - MAX_ROWS} smaller layers are not shown" in text
    shown = [int(line.split()[0]) for line in text.splitlines() if line.strip()[:1].isdigit() and "int4" in line]
    assert len(shown) == MAX_ROWS
    assert shown == sorted(shown)
    assert 30 in shown


def test_names_like_markup_are_shown_as_they_are() -> None:
    net = nn.ModuleDict({"[red]x": nn.Linear(4, 4)})
    assert "[red]x" in summary(cost(net), [], lq_plugin.prepare(net, "w4"), "[bold]t", width=100)
