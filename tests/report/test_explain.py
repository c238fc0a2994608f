"""`lq-explain`: the dry run says what preparing the model then does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import lq_plugin
from lq_plugin.commands.explain import explain as lq_explain
from lq_plugin.demo.digits import DigitsCNN
from lq_plugin.errors import PlanError, QuantizationError
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.report.explain import explain
from lq_plugin.report.models import build_model, zeros
from tests.report.synthetic import PLAN, Deep

STAGED = {
    "rules": [{"match": "*", "weight": "int8"}, {"match": "body.*", "weight": "int4", "start": "epoch 2"}],
    "schedule": {"activations_start": "epoch 1", "batch_norm_freeze": "step 300"},
}


def shown(what, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_it_tells_what_prepare_then_does_and_changes_nothing() -> None:
    model, x = Deep(6, 8), torch.zeros(1, 3, 8, 8)
    before = {name: type(module) for name, module in model.named_modules()}
    found = explain(PLAN, model, lambda: model(x))
    assert {name: type(module) for name, module in model.named_modules()} == before
    recording = record(model, lambda: model(x))
    ledger = lq_plugin.prepare(model, PLAN)
    ledger.add_recording(recording)
    assert found.cost == cost(model, recording)
    assert found.ledger.rows() == ledger.rows()
    assert [row["weight"] for row in found.rows()] == [
        str(entry.plan.weight) for entry in ledger if not entry.functional
    ]
    text = shown(found.table())
    assert "int3 per_channel mse" in text
    assert f"{found.cost.quantizable_effective_bits:.2f}" in text
    assert f"{found.cost.effective_bits:.2f} effective bits a parameter" in shown(found.summary(), 200)
    assert "float: the plan leaves its input float: head" in shown(found.summary(), 200)


def test_stages_and_the_time_line() -> None:
    found = explain(STAGED, Deep(3, 4))
    assert [row["weight"] for row in found.rows()] == ["int8, from epoch 2: int4", "int8, from epoch 2: int4", "int8"]
    lines = shown(found.timeline(), 200).splitlines()
    assert lines[0].rstrip() == "from the start: weights are quantized"
    assert [line.partition("▶  ")[2].rstrip() for line in lines[1:]] == [
        "epoch 1: activations are quantized", "epoch 2: body.*: weight int4", "step 300: batch norms freeze",
    ]  # fmt: skip
    assert lines[1].index("●") < lines[2].index("●")


def test_operations_are_told_where_the_plan_names_them() -> None:
    plan = {"rules": [{"match": "*", "weight": "int4"}, {"match": "block.add_0", "input": "uint8 affine"}]}
    model, x = DigitsCNN(width=4), torch.zeros(1, 1, 8, 8)
    found = explain(plan, model, lambda: model(x))
    assert found.operations() == [{"operation": "block.add_0", "kind": "add", "input": "uint8 affine"}]
    text = shown(found.summary(), 200)
    assert "operation block.add_0 (add): operands uint8 affine" in text
    assert "no rule asks for it" not in text
    with pytest.raises(PlanError, match="operations are known from a recorded batch only"):
        explain(plan, model)


def test_plans_that_do_not_fit_are_refused_whole() -> None:
    plan = {"rules": [{"match": "nothing", "weight": "int4"}, {"match": "head", "weight": "int4 group3"}]}
    with pytest.raises(PlanError, match=r"2 faults(.|\n)*'nothing' matches no layer(.|\n)*group size 3"):
        explain(plan, Deep(3, 4))


def test_names_like_markup_are_shown_as_they_are() -> None:
    net = nn.ModuleDict({"[red]x": nn.Linear(4, 4), "y": nn.Linear(4, 4)})
    assert "[red]x" in shown(explain("w4", net).table())


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text("from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, "
    "size=4):\n"
                                         "        super().__init__(nn.Linear(size, 2))\nnumber = 3\nmake = lambda: 5\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    built = build_model("my_nets:Net", ["size=6"])
    assert built[0].in_features == 6  # type: ignore[index]
    assert type(build_model("digits_cnn", ["width=8"])).__name__ == "DigitsCNN"
    configs = tmp_path / "configs" / "model"
    configs.mkdir(parents=True)
    (configs / "mine.yaml").write_text("_target_: torch.nn.Linear\nin_features: 3\nout_features: 2\n")
    assert build_model("mine", ["out_features=5"], tmp_path / "configs").weight.shape == (5, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("no_such_module_here:Net", [], "No module named 'no_such_module_here'"),
        ("torch.nn:Linearr", [], "Did you mean 'Linear'"),
        ("torch.nn:Linear", [], "missing 2 required positional arguments"),
        ("torch.nn:Linear", ["4"], "arguments are written key=value, got '4'"),
        ("math:pi", [], "math:pi is a float, neither a module nor a callable"),
        ("builtins:dict", [], "made a dict, not a torch.nn.Module"),
        ("torch.nn:Linear", ["in_features=[4"], r"in_features=\[4: the value is no YAML"),
        ("digits_cn", [], "Could not find 'model/digits_cn'(.|\n)*digits_cnn"),
        ("digits" * 60, [], "File name too long"),
    ],
)
def test_models_that_are_none(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        build_model(name, arguments)


@pytest.mark.parametrize("shape", ["", "1,x", "0,3", "-1"])
def test_shapes_that_are_none(shape: str) -> None:
    with pytest.raises(QuantizationError, match="a shape is written like"):
        zeros(shape)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert lq_explain(["w4a8", "digits_cnn", "width=8", "--shape", "1,1,8,8"]) == 0
    out = capsys.readouterr().out
    assert "stem.0" in out
    assert "6 quantized" in out
    assert "functional add: no rule asks for it by name: block.add_0" in out
    assert lq_explain(["w4a8", "digits_cnn", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["totals"]["quantizable_effective_bits"] == pytest.approx(4.15, abs=0.05)
    assert (content["totals"]["weight_coverage"], content["totals"]["compute_coverage"]) == (1.0, None)
    assert content["float"][0]["layer"] == "stem.1"
    assert lq_explain(["w4a99", "digits_cnn"]) == 2
    assert "bit_width must be 1..16, got 99" in capsys.readouterr().err
    plan = tmp_path / "plan.yaml"
    plan.write_text("rules: [{match: 'convv', weight: int4}]")
    assert lq_explain([str(plan), "digits_cnn"]) == 2
    assert "matches no layer" in capsys.readouterr().err
    assert lq_explain(["w4a8", "digits_cnn", "--shape", "1,3,8,8"]) == 2
    assert "DigitsCNN on zeros of shape 1,3,8,8 raised RuntimeError: " in capsys.readouterr().err


def test_readme_has_the_defaults_that_the_code_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        lq_explain(["--defaults"])
    assert ended.value.code == 0
    table = capsys.readouterr().out
    assert table in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    # By hand, against the plan's own words.
    assert "| `a8` | 0..255 | tensor | yes | ema |" in table
    assert "| `/ uint8` | 0..255 | tensor | no | minmax |" in table
    assert "`percentile` is `percentile:99.99`" in table
