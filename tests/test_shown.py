"""Objects that users print: each is a table in a terminal and in a notebook."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from lq_plugin import PTQ, QAT, PlanError, QuantPlan, prepare
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost

PLAN = {
    "rules": [{"match": "*", "weight": "int4", "input": "uint8 affine"}, {"match": "2", "weight": "int8"}],
    "schedule": {"activations_start": "epoch 1"},
    "target": "onnx",
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


class Cells(HTMLParser):
    """Reads the cells of a table, by the rows they are in; refuses tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def shown() -> dict[str, Any]:
    model = net()
    ledger = prepare(model, PLAN)
    recording = record(model, lambda: model(torch.zeros(3, 4)))
    ledger.add_recording(recording)
    plan = QuantPlan.parse(PLAN)
    return {"ledger": ledger, "cost": cost(model, recording), "plan": plan, "dry run": plan.describe(net())}


@pytest.mark.parametrize("name", ["ledger", "cost", "plan", "dry run"])
def test_terminal_rich_and_notebook_show_the_same_cells(name):
    thing = shown()[name]
    text = str(thing)
    assert text == f"{thing}"
    assert all(line == line.rstrip() for line in text.splitlines())
    rows = Cells(thing._repr_html_()).rows
    assert len({len(row) for row in rows}) == 1
    for row in rows:
        line = r"\s+".join(re.escape(cell) for cell in row if cell)
        assert re.search(line, text), f"{row} is not in\n{text}"
    console = Console(width=160, color_system=None)
    with console.capture() as captured:
        console.print(thing)
    for row in rows:
        assert all(cell in captured.get() for cell in row)


def test_a_ledger_says_what_is_float_and_why():
    text = str(shown()["ledger"])
    assert re.search(r"2 quantized, 1 float; coverage 100\.0% of weights, 100\.0% of MACs", text)
    assert re.search(r"(?m)^ 0 +Linear +int4.*uint8 affine +40 +32$", text)
    assert re.search(r"(?m)^ 1 +LayerNorm +float +float +16 +0 +normalization$", text)


def test_a_cost_has_the_sizes_by_hand():
    # 32 and 16 weights at 4 and 8 bits; a scale of 32 bits for each tensor.
    text = str(shown()["cost"])
    assert re.search(rf"(?m)^ 0 +Linear +32 +4 +8 +{(32 * 4 + 32) / 32:.2f}", text)
    assert re.search(rf"(?m)^ 2 +Linear +16 +8 +8 +{(16 * 8 + 32) / 16:.2f}", text)


def test_a_plan_says_rules_schedule_and_target():
    text = str(QuantPlan.parse(PLAN))
    assert text.startswith("plan of 2 rules; for target onnx;")
    assert "activations_start epoch 1" in text
    assert re.search(r"(?m)^ 2 +int8 per_channel$|^ 2 +int8$", text)


def test_names_are_no_markup_and_no_html():
    model = nn.ModuleDict({"[bold]<b>": nn.Linear(2, 2)})
    ledger = prepare(model, "w8")
    assert "[bold]<b>" in str(ledger)
    assert "[bold]&lt;b&gt;" in ledger._repr_html_()
    plan = QuantPlan.parse({"rules": [{"match": "a\x1b[31mb", "weight": "int4"}]})
    assert "\x1b" not in str(plan)


def test_describing_changes_nothing_and_refuses_what_does_not_fit():
    model = net()
    found = QuantPlan.parse(PLAN).describe(model)
    assert found.layers.keys() == {"0", "2"}
    assert type(model[0]) is nn.Linear
    with pytest.raises(PlanError, match="nowhere"):
        QuantPlan.parse({"rules": [{"match": "nowhere", "weight": "int4"}]}).describe(model)


def test_callbacks_say_their_plan_and_what_became_of_it():
    qat = QAT(PLAN)
    assert repr(qat) == "<QAT '*': weight int4, input uint8 affine and 1 more rule for onnx; in no model yet>"
    assert "in no model yet" in repr(PTQ("w4a8"))
    assert Cells(qat._repr_html_()).rows[1][0] == "*"
    qat.ledger = prepare(net(), PLAN)
    assert repr(qat).endswith("; 2 quantized, 1 float; coverage 100.0% of weights>")
    assert Cells(qat._repr_html_()).rows[1][0] == "0"
