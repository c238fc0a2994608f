"""The data of a report: what is measured is what it says, and JSON gives it back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import lq_plugin
from lq_plugin.errors import QuantizationError
from lq_plugin.functional.affine import fake_quantize, qparams_from_bounds
from lq_plugin.functional.error import sqnr_db
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.ranges import Sample
from lq_plugin.report import ReportData, Series, model_report
from lq_plugin.report.codec import decode, encode
from lq_plugin.report.data import Curve, LayerReport, ModelReport, StudyReport, digits
from lq_plugin.report.model import plan_of
from lq_plugin.report.tensors import binned, mse_curve
from lq_plugin.search import study_report
from lq_plugin.search.study.report import hypervolume
from tests.report.synthetic import PLAN, Deep, deep_report, large_study


@pytest.fixture(scope="module")
def small() -> ReportData:
    return deep_report(layers=6, width=8)


@pytest.fixture(scope="module")
def study() -> ReportData:
    return study_report(large_study(trials=40, layers=5))


def model_of(report: ReportData) -> ModelReport:
    assert report.model is not None
    return report.model


def study_of(report: ReportData) -> StudyReport:
    assert report.study is not None
    return report.study


def test_json_gives_the_report_back(small: ReportData, study: ReportData, tmp_path: Path) -> None:
    for report in (small, study, ReportData("empty")):
        assert ReportData.from_json(report.to_json()) == report
        assert ReportData.load(report.save(tmp_path / "deep" / "report.json")) == report


@given(st.lists(st.floats(allow_nan=False), max_size=5), st.text(max_size=30))
def test_any_numbers_and_names_survive_json(values: list[float], name: str) -> None:
    model = ModelReport(name, "", {"bytes": None}, [], 0.5, training=[Series(name, list(range(len(values))), values)])
    assert ReportData.from_json(ReportData(name, model).to_json()) == ReportData(name, model)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(QuantizationError, match="is no JSON"):
        ReportData.from_json("{")
    with pytest.raises(QuantizationError, match="no report of lq_plugin"):
        ReportData.from_json('{"title": "x"}')
    with pytest.raises(QuantizationError, match="version 99, this lq_plugin reads 1 to 3"):
        ReportData.from_json('{"format": "lq_plugin.report", "version": 99}')
    with pytest.raises(QuantizationError, match=r"report\.error\[1\] must be a number, got 'x'"):
        decode(Curve, {"threshold": [1], "error": [1.5, "x"]})
    with pytest.raises(QuantizationError, match=r"report must be only threshold, error, got"):
        decode(Curve, {"threshold": [], "error": [], "colour": 1})
    assert encode(Curve([1.0], [math.inf])) == {"threshold": [1.0], "error": ["inf"]}


def test_reports_of_version_1_lose_what_has_another_meaning_now() -> None:
    layer = {
        "name": "a",
        "kind": "Linear",
        "shape": [2, 2],
        "specs": {},
        "weight_bits": 4,
        "input_bits": 8,
        "elements": 4,
        "bytes": 2,
    }
    model = {
        "name": "Net", "plan": "", "coverage": 1.0, "totals": {"effective_bits": 4.2, "bytes": 9, "macs": 64,
        "bops": 2048},
        "layers": [layer | {"float_bytes": 16, "macs": 64, "bops": 2048}], "ledger": [{"name": "a", "macs": 64}],
    }  # fmt: skip
    trial = {
        "number": 0,
        "metric": 0.9,
        "cost": 4.2,
        "origin": "sampled",
        "seconds": 1.0,
        "numbers": {"effective_bits": 4.2, "bops": 7},
    }
    study = {
        "name": "s",
        "metric": "acc",
        "cost": "effective_bits",
        "costs": ["effective_bits", "bops"],
        "maximize": True,
        "trials": [trial],
    }
    old = {"format": "lq_plugin.report", "version": 1, "title": "old", "model": model, "study": study}
    report = ReportData.from_json(json.dumps(old))
    assert report.model is not None
    assert report.study is not None
    assert report.model.totals == {"quantizable_effective_bits": 4.2, "bytes": 9}
    assert (report.model.weight_coverage, report.model.layers[0].macs, report.model.ledger[0]["macs"]) == (
        None,
        None,
        None,
    )
    assert (report.study.cost, report.study.costs) == (
        "quantizable_effective_bits",
        ["quantizable_effective_bits", "batch_bops"],
    )
    assert report.study.trials[0].numbers == {"quantizable_effective_bits": 4.2, "batch_bops": 7}


def test_numbers_are_those_of_cost_ledger_and_tensors() -> None:
    torch.manual_seed(0)
    model, x = Deep(3, 8), torch.randn(4, 3, 8, 8)
    recording = record(model, lambda: model(x))
    ledger = lq_plugin.prepare(model, "w3 mse a8")
    statistics = lq_plugin.calibrate(model, [x])
    report = model_of(model_report(model, ledger=ledger, recording=recording, statistics=statistics))
    priced = cost(model, recording)
    assert [layer.bytes for layer in report.layers] == [row.bytes for row in priced]
    assert [layer.bops for layer in report.layers] == [row.bops for row in priced]
    assert report.totals["bytes"] == digits(priced.bytes, 6)
    assert (report.weight_coverage, report.compute_coverage) == (1.0, None), "the ledger has seen no batch"
    assert report.ledger == ledger.rows()
    for layer, (name, module) in zip(report.layers, quantized_layers(model), strict=True):
        weight = module.canonical(module.weight)
        assert layer.name == name
        assert layer.sqnr_db["weight"] == digits(sqnr_db(weight, module.weight_quantizer.quantize_values(weight)))  # type: ignore[union-attr]
        assert layer.boxes is not None
        wanted = np.quantile(weight.detach().flatten(1).numpy(), 0.25, axis=1)
        assert layer.boxes.quantiles[2] == [digits(value, 3) for value in wanted]
        assert {view.slot for view in layer.views} == {"weight", "input"}


def test_reporting_changes_nothing() -> None:
    model, x = Deep(3, 8).train(), torch.randn(2, 3, 8, 8)
    lq_plugin.prepare(model, PLAN | {"rules": PLAN["rules"][:1]})
    statistics = lq_plugin.calibrate(model, [x])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model_report(model, statistics=statistics)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_marks_and_curve_measure_what_fake_quantize_does() -> None:
    torch.manual_seed(0)
    x, grid = torch.randn(1, 4096), QuantSpec.parse("int4").grid
    sample = Sample.from_tensor(x)
    curve = mse_curve(sample, grid)
    for index in (10, 30, 45):
        # The curve names its upper bound; both bounds shrink together.
        share = curve.threshold[index] / float(x.max())
        scale, zero_point = qparams_from_bounds(x.min() * share, x.max() * share, grid)
        wanted = float((fake_quantize(x, scale, zero_point, grid) - x).square().mean())
        assert curve.error[index] == pytest.approx(wanted, rel=2e-2)
    low, high, counts, zeros = binned(sample)
    assert (low, high) == (digits(x.min()), digits(x.max()))
    assert counts == [digits(c, 3) for c in np.histogram(x.numpy(), np.linspace(float(x.min()), float(x.max()), 97))[0]]
    assert zeros == 0
    assert binned(Sample.from_tensor(x.relu()))[3] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "spec",
    ["int4 group4", "twn", "bwn", "kmeans2", "mx6", "mxfp4", "nvfp4", "uint4 affine", "int3 per_channel lsq", "int12"],
)
def test_every_kind_of_weight_has_a_page(spec: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    lq_plugin.prepare(net, {"rules": [{"match": "*", "weight": spec, "input": "uint8 affine mse"}]})
    statistics = lq_plugin.calibrate(net, [torch.randn(64, 32)])
    report = model_report(net, statistics=statistics)
    first: LayerReport = model_of(report).layers[0]
    assert first.boxes is not None
    assert first.error is not None
    assert first.error.rows == 16
    assert {view.slot for view in first.views} == {"weight", "input"}
    (weight,) = (view for view in first.views if view.slot == "weight")
    assert sum(weight.counts) == pytest.approx(32 * (1 if weight.what != "whole tensor" else 16), rel=0.05)
    assert ReportData.from_json(report.to_json()) == report


def test_what_is_not_calibrated_and_what_is_float() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    lq_plugin.prepare(net, {"rules": [{"match": "0", "weight": "int4 mse", "input": "uint8"}]})
    first, second = model_of(model_report(net)).layers
    assert first.sqnr_db == {}
    assert first.error is None
    assert second.weight_bits == 32
    assert second.reason == "the plan leaves its weight and input float"
    assert second.flow is not None
    assert [node.kind for node in second.flow.nodes] == ["float", "float", "operation", "float", "float", "note"]


def test_the_flow_says_what_is_quantized_and_where_the_gradient_passes() -> None:
    model, x = Deep(3, 4), torch.randn(1, 3, 8, 8)
    recording = record(model, lambda: model(x))
    plan = {
        "rules": [
            {"match": "*", "weight": "int8"},
            {"match": "*", "weight": "int4", "input": "uint8 affine", "start": "epoch 2"},
        ]
    }
    lq_plugin.prepare(model, plan)
    layer = model_of(model_report(model, QuantPlan.parse(plan), recording=recording)).layers[1]
    assert layer.flow is not None
    nodes = {node.id: node for node in layer.flow.nodes}
    assert nodes["weight_quantizer"].label == "int4"
    assert "STE: straight through" in nodes["weight_quantizer"].detail
    assert "from the start: int8; from epoch 2: int4" in nodes["weight_quantizer"].detail
    assert nodes["input_quantizer"].detail.endswith("no range yet")
    assert nodes["source"].detail == "from mul"
    assert nodes["output"].detail == "to relu"
    assert ["weight_quantizer", "operation"] in layer.flow.edges


def test_a_plan_is_read_back_from_the_layers() -> None:
    from lq_plugin.model.survey import Survey

    model = Deep(4, 4)
    plan = {"rules": [{"match": "body.*", "weight": "int8"}, {"match": "body.1", "weight": "int4", "start": "epoch 2"}]}
    lq_plugin.prepare(model, plan)
    survey = Survey.of(model)
    found = plan_of(survey).resolve(survey.infos(), survey.others())
    assert found == QuantPlan.parse(plan).resolve(survey.infos(), survey.others())


def test_roundings_are_counted_against_nearest() -> None:
    torch.manual_seed(0)
    model, batches = Deep(3, 8), [torch.randn(16, 3, 8, 8) for _ in range(2)]
    lq_plugin.prepare(model, "w2 per_channel mse")
    statistics = lq_plugin.calibrate(model, batches)
    before = {name: layer.weight.detach().clone() for name, layer in quantized_layers(model)}
    result = reconstruct(model, batches, by="layer", iterations=40)
    report = model_of(model_report(model, statistics=statistics, reconstruction=result, float_weights=before))
    layer, (name, module) = report.layers[1], quantized_layers(model)[1]
    assert layer.rounding is not None
    quantizer = module.weight_quantizer
    assert quantizer is not None
    scale = quantizer.scale.reshape(-1, 1)
    low, high = quantizer.spec.grid.quant_min, quantizer.spec.grid.quant_max
    # An own count: between two levels, and not where nearest is.
    w, now = before[name].flatten(1) / scale, (module.weight.detach().flatten(1) / scale).round()
    free = (w.floor() >= low) & (w.floor() + 1 <= high)
    nearest = torch.floor(w + 0.5)
    assert layer.rounding.up == int(((now > nearest) & free).sum())
    assert layer.rounding.down == int(((now < nearest) & free).sum())
    assert layer.rounding.same + layer.rounding.up + layer.rounding.down == int(free.sum())
    assert layer.rounding.up + layer.rounding.down > 0
    # The error is that against the float weights, not against what was rounded.
    assert layer.sqnr_db["weight"] == digits(sqnr_db(before[name], module.weight.detach()))
    assert layer.rounding.unit.startswith("body.1")


def test_the_study_tells_front_bits_and_importance(study: ReportData) -> None:
    found, result = study_of(study), large_study(trials=40, layers=5)
    assert [t.number for t in found.trials if t.front] == sorted(c.number for c in result.front)
    assert found.layers == [f"body.{i}" for i in range(4)] + ["head"]
    best = max(result.front, key=lambda c: c.metric)
    assert found.best[0].number == best.number
    assert found.best[0].weight_bits == [rule.weight.bit_width for rule in best.plan.rules]  # type: ignore[union-attr]
    assert QuantPlan.from_dict(__import__("yaml").safe_load(found.best[0].plan)) == best.plan
    assert set(found.parameters) <= set(found.importance)
    assert all(len(values) == 40 for values in found.parameters.values())
    assert sum(found.importance.values()) == pytest.approx(1, abs=0.01)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12), st.booleans())
def test_hypervolume_counts_dominated_cells(points: list[tuple[int, int]], maximize: bool) -> None:
    costs, metrics = zip(*points, strict=True)
    found = hypervolume([(float(c), float(m)) for c, m in points], maximize)
    width, height = max(costs) - min(costs), max(metrics) - min(metrics)
    assert found == sorted(found)
    if not width or not height:
        assert found[-1] == 0
        return
    for count in range(1, len(points) + 1):
        cells = 0
        for cost_cell in range(min(costs), max(costs)):
            for metric_cell in range(min(metrics), max(metrics)):
                better = (lambda m, cell=metric_cell: m > cell) if maximize else (lambda m, cell=metric_cell: m <= cell)
                cells += any(c <= cost_cell and better(m) for c, m in points[:count])
        assert found[count - 1] == pytest.approx(cells / (width * height), abs=1e-3)
