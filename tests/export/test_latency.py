"""Latency tables: what is timed, what is remembered, and the sum that predicts a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.errors import ExportError
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import export_onnx
from lq_plugin.export.latency import LatencyOptions, LatencyTable, latency_table, model_graph, model_latency, pair
from lq_plugin.export.onnx_file.float_model import float_graph

QUICK = LatencyOptions(rounds=3)


def plan(weight: str | None = None, read: str | None = None) -> LayerPlan:
    return LayerPlan(weight=QuantSpec.parse(weight) if weight else None, input=QuantSpec.parse(read) if read else None)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4)).eval()


def test_a_plan_exchanges_the_time_of_its_layers() -> None:
    layers = {
        "a": {"float": 3.0, "int8 per_channel / 8 bit": 1.0},
        "b": {"float": 2.0, "int4 per_channel / float": 2.5},
    }
    table = LatencyTable(QUICK, 10.0, layers, {"c": "reason"})
    fast, slow = plan("int8 per_channel mse", "uint8 affine"), plan("int3 per_channel")
    assert table.predict({}) == table.predict({"a": LayerPlan()}) == 10.0
    assert table.predict({"a": fast}) == 8.0
    assert table.predict({"a": fast, "b": slow, "c": fast, "d": fast}) == 8.5
    with pytest.raises(
        ExportError,
        match="latency of b was not measured for 'int8 per_channel / 8 bit'; measured: float, int4 per_channel",
    ):
        table.predict({"b": fast})


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (
            plan("int8 per_channel mse", "uint8 affine mse"),
            plan("int7 per_channel minmax", "int8 percentile:99.9"),
            True,
        ),
        (plan("int8 per_channel"), plan("int8 per_tensor"), False),
        (plan("int4 group16"), plan("int4 group32"), False),
        (plan("int4 group16"), plan("int3 group16"), True),
        (plan("int3 per_channel"), plan("int2 per_channel"), False),
        (plan("int8"), plan("int8", "uint8"), False),
        (plan("int8", "uint8"), plan("int8", "uint7"), False),
        (plan("bwn"), plan("twn"), False),
        (plan("int8", "int8 per_token dynamic"), plan("int8", "int8"), False),
    ],
)
def test_what_leads_to_the_same_kernel_is_timed_once(one: LayerPlan, other: LayerPlan, equal: bool) -> None:
    assert (pair(one) == pair(other)) == equal


def test_tables_of_earlier_versions_have_the_bits_of_the_plan() -> None:
    table = LatencyTable(LatencyOptions("openvino"), 8.0, {"0": {"float": 4.0, "int2 per_channel / 8 bit": 2.0}})
    assert table.predict({"0": plan("int2 per_channel", "uint8 affine")}) == 6.0


def test_half_bytes_next_to_tokens_have_an_entry_of_their_own() -> None:
    """ExecuTorch holds 4-bit weights as bytes, but as half a byte next to inputs with a range for each token."""
    row = {"float": 4.0, "int8 per_channel / 8 bit": 3.0}
    row |= {"int8 per_channel / 8 bit dynamic": 2.0, "int4 per_channel / 8 bit dynamic": 1.0}
    table = LatencyTable(LatencyOptions("executorch"), 8.0, {"0": row})
    found = {
        (weight, read): table.predict({"0": plan(f"{weight} per_channel", read)})
        for weight in ("int8", "int4", "int3")
        for read in ("int8", "int8 per_token affine dynamic")
    }
    assert list(found.values()) == [7.0, 6.0, 7.0, 5.0, 7.0, 5.0]
    earlier = LatencyTable(LatencyOptions("onnxruntime"), 8.0, {"0": {"float": 4.0, "int8 per_channel / 8 bit": 3.0}})
    assert earlier.predict({"0": plan("int8 per_channel", "uint8 affine dynamic")}) == 7.0


def test_milliseconds_are_those_of_one_sample() -> None:
    table = LatencyTable(LatencyOptions(batch=4), 8.0, {"0": {"float": 4.0, "int8 per_channel / 8 bit": 2.0}})
    int8 = LayerPlan(weight=QuantSpec.parse("int8 per_channel"), input=QuantSpec.parse("uint8 affine"))
    assert (table.predict({}), table.predict({"0": int8})) == (2.0, 1.5)


@pytest.mark.parametrize(("runtime", "smallest"), [("onnxruntime", 2), ("openvino", 4)])
def test_every_layer_under_every_pair(runtime: str, smallest: int) -> None:
    pytest.importorskip(runtime)
    model, int8, int2 = net(), plan("int8 per_channel", "uint8 affine"), plan("int2 per_channel")
    plans = [{"0": int8}, {"0": int2}, {"2": int8}]
    table = latency_table(model, [torch.randn(3, 32)], plans, LatencyOptions(runtime, batch=2, rounds=3))
    assert {name: list(row) for name, row in table.layers.items()} == {
        "0": ["float", "int8 per_channel / 8 bit", f"int{smallest} per_channel / float"],
        "2": ["float", "int8 per_channel / 8 bit"],
    }
    assert all(value > 0 for row in table.layers.values() for value in (*row.values(), table.float_model))
    # Equal layers have one measurement.
    assert table.layers["0"]["float"] == table.layers["2"]["float"]
    # Of one of the two samples.
    assert table.predict({"2": int8}) == pytest.approx(
        max(table.float_model + table.layers["2"]["int8 per_channel / 8 bit"] - table.layers["2"]["float"], 0.0) / 2
    )


def test_what_was_measured_is_remembered_for_the_same_place_only(tmp_path: Path) -> None:
    cache = tmp_path / "folder" / "latency.json"
    options = LatencyOptions(rounds=2, cache=str(cache))
    plans = [{"0": plan("int8 per_channel")}]
    first = latency_table(net(), [torch.randn(1, 32)], plans, options)
    content = json.loads(cache.read_text())
    assert list(content) == [options.place]
    assert len(content[options.place]) == 3, "the model, and a layer under two pairs"
    content[options.place] = dict.fromkeys(content[options.place], 7.0)
    cache.write_text(json.dumps(content))
    assert latency_table(net(), [torch.randn(1, 32)], plans, options).layers["0"] == dict.fromkeys(
        first.layers["0"], 7.0
    )
    other = latency_table(net(), [torch.randn(1, 32)], plans, LatencyOptions(batch=2, rounds=2, cache=str(cache)))
    assert 7.0 not in other.layers["0"].values()
    assert len(json.loads(cache.read_text())) == 2


def test_layers_that_are_no_modules_are_left_out() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    int8 = plan("int8 per_channel")
    table = latency_table(
        Recurrent().eval(), [torch.randn(1, 3, 8)], [{"lstm.weight_ih_l0": int8, "head": int8}], QUICK
    )
    assert list(table.left_out) == ["lstm.weight_ih_l0"]
    assert table.predict({"lstm.weight_ih_l0": int8}) == table.float_model


def test_whole_models_are_measured_as_they_are() -> None:
    model = net()
    assert model_latency(model, [torch.randn(1, 32)], QUICK) > 0
    prepare(model, QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine")]))
    calibrate(model, [torch.randn(8, 32)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert model_latency(model, [torch.randn(1, 32)], QUICK) > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"runtime": "openvin"},
            "unknown runtime 'openvin'; valid: ai_edge_litert, executorch, .*, openvino. Did you mean 'openvino'",
        ),
        ({"batch": 0, "rounds": 0}, "(?s)batch must be at least 1, got 0.*rounds must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        LatencyOptions(**options)


def test_specs_and_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="0 under 'kmeans / float': .*no tables for single channels"):
        latency_table(net(), [torch.randn(1, 32)], [{"0": plan("kmeans3 per_channel")}], QUICK)
    broken = tmp_path / "broken.json"
    broken.write_text("[1, 2")
    with pytest.raises(ExportError, match=r"broken\.json is no file of latencies"):
        latency_table(net(), [torch.randn(1, 32)], [], LatencyOptions(cache=str(broken)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Models whose graph was made."""
    models: list[nn.Module] = []

    def counted(plain: nn.Module, *arguments: Any) -> Any:
        models.append(plain)
        return float_graph(plain, *arguments)

    for module in ("lq_plugin.export.onnx_file.float_model", "lq_plugin.export.onnx_file.write"):
        monkeypatch.setattr(f"{module}.float_graph", counted)
    return models


def test_the_graph_of_a_layer_is_made_once_for_all_of_its_specs(made: list[nn.Module]) -> None:
    plans = [{name: plan(f"int{bits} per_channel")} for name in "023" for bits in (2, 4, 8)]
    table = latency_table(net(), [torch.randn(1, 32)], plans, QUICK)
    assert [len(row) for row in table.layers.values()] == [4, 4, 4]
    # The first two layers are alike.
    assert len(made) == 3, "the model and two layers"


def test_the_graph_of_a_model_is_made_once_for_several_plans(made: list[nn.Module]) -> None:
    model, x = net(), [torch.randn(3, 32)]
    graph = model_graph(model, x, QUICK)
    for text in ("w8a8", "w4a8"):
        prepare(model, text)
        calibrate(model, x)
        assert model_latency(model, x, QUICK, graph) > 0
        remove(model)
    assert len(made) == 1


def test_a_graph_that_was_made_before_gives_the_same_file(tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 32)
    graph = float_graph(model, (x,))
    prepare(model, "w4a8")
    calibrate(model, [x])
    for name, exported in (("new", None), ("first", graph), ("second", graph)):
        export_onnx(model, (x,), tmp_path / name, dynamic_batch=False, exported=exported)
    assert len({(tmp_path / name).read_bytes() for name in ("new", "first", "second")}) == 1
