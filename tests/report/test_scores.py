"""Scores of a model's variants and their intervals; a model and its search on one page."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
import yaml

from lq_plugin.commands.report_sources import load_report
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.report import ReportData
from lq_plugin.report.data import LayerReport, ModelReport, Score
from lq_plugin.report.joined import joined, trial_of
from lq_plugin.report.provenance import command, provenance
from lq_plugin.report.scores import make_scores
from lq_plugin.search import study_report
from tests.report.synthetic import deep_report, large_study

NORMAL = 1.959963984540054


def wilson(share: float, n: int) -> tuple[float, float]:
    """Equation 4 of Brown, Cai and DasGupta, 2001."""
    middle = (share * n + NORMAL**2 / 2) / (n + NORMAL**2)
    half = NORMAL * sqrt(n) / (n + NORMAL**2) * sqrt(share * (1 - share) + NORMAL**2 / (4 * n))
    return middle - half, middle + half


@pytest.mark.parametrize(
    ("right", "n"), [(353, 360), (0, 10), (10, 10), (7602, 10_000), (38_412, 50_000), (777_777, 1_000_003)]
)
def test_an_accuracy_has_wilsons_interval(right: int, n: int) -> None:
    value = float(torch.tensor(right / n, dtype=torch.float32))
    (score,) = make_scores({"QAT": {"val/acc": value}}, n)
    assert score.samples == n
    assert (score.low, score.high) == (
        pytest.approx(wilson(right / n, n)[0], abs=1e-4),
        pytest.approx(wilson(right / n, n)[1], abs=1e-4),
    )


def test_what_is_no_share_of_samples_has_none() -> None:
    found = make_scores(
        {"PTQ": {"val/loss": 0.5, "val/acc": 0.12345, "train/acc": 1.0, "val/f1": 0.5, "val/nan": float("nan")}}, 100
    )
    assert [(s.metric, s.low) for s in found] == [("val/loss", None), ("val/acc", None), ("val/f1", None)]
    assert make_scores({"PTQ": {"val/acc": 0.5}})[0].low is None
    # Half a sample of a million is none, and above four million float32 does not tell.
    for right, count, has in ((600_000, 1_000_000, True), (600_000.5, 1_000_000, False), (3_000_000, 5_000_000, False)):
        assert (make_scores({"PTQ": {"acc": right / count}}, count)[0].low is not None) is has
    both = make_scores({"float": {"acc": 0.5, "loss": 1.0}, "QAT": {"acc": 0.25}}, {"acc": 4})
    assert [(s.variant, s.metric, s.samples) for s in both] == [
        ("float", "acc", 4),
        ("QAT", "acc", 4),
        ("float", "loss", None),
    ]


def trained_on(study: ReportData, number: int, **changes: object) -> ReportData:
    assert study.study is not None
    plan = QuantPlan.from_dict(yaml.safe_load(next(best.plan for best in study.study.best if best.number == number)))
    scheduled = QuantPlan(plan.rules, {"observer_freeze": "epoch 2"})
    layer = LayerReport("body.0", "Conv2d", [4, 4], {"weight": str(plan.rules[0].weight)}, 4, 8, 16, 8, 64)
    model = ModelReport("Net", scheduled.to_yaml(), {"bytes": 1.0}, [layer], metrics={"val/acc": 0.9}, **changes)  # type: ignore[arg-type]
    return ReportData("net", model=model)


def test_a_model_is_found_among_the_trials_of_its_search() -> None:
    result = large_study(trials=30, layers=4)
    result.study.set_user_attr(
        "sensitivity", {"body.0.weight": {f"int{b} per_channel mse": 1.0 / 4**b for b in range(2, 9)}}
    )
    study = study_report(result)
    assert study.study is not None
    assert study.sensitivity is not None
    number = study.study.best[1].number
    scores = [Score("QAT", "val/acc", 0.93, 100, *wilson(0.93, 100))]
    page = joined(trained_on(study, number, scores=scores), study)
    assert page.trained == number
    assert page.study == study.study
    assert page.model is not None
    trial = next(t for t in study.study.trials if t.number == number)
    assert [(s.variant, s.value, s.samples) for s in page.model.scores] == [
        ("float", 0.948, 100),
        ("PTQ", trial.metric, 100),
        ("QAT", 0.93, 100),
    ]
    bits = study.study.best[1].weight_bits[0]
    assert bits is not None
    assert page.model.layers[0].sensitivity == pytest.approx(1.0 / 4**bits, rel=1e-3)
    # Without scores of its own, those that the run logged.
    plain = joined(trained_on(study, number), study).model
    assert plain is not None
    assert [(s.variant, s.value) for s in plain.scores][-1] == ("this model", 0.9)
    other = deep_report(layers=3, width=8)
    assert other.model is not None
    assert trial_of(other.model, study.study) is None
    assert trial_of(replace(other.model, plan="rules: [{"), study.study) is None


def test_a_measured_sensitivity_is_found_beside_the_run(tmp_path: Path) -> None:
    deep_report(layers=3, width=8).save(tmp_path / "run" / "report.json")
    values = {"head.weight": {"int4 group8": 0.125, "int8 per_channel": 0.001}}
    (tmp_path / "sensitivity.json").write_text(json.dumps({"seed": 0, "measures": {"fisher": values, "kl": {}}}))
    found = load_report(tmp_path)
    assert found.sensitivity is not None
    assert (found.sensitivity.measure, found.sensitivity.values) == ("fisher", values)
    assert found.model is not None
    assert found.model.layers[-1].sensitivity == 0.125
    (tmp_path / "sensitivity.json").write_text('{"measures": {}}')
    with pytest.raises(QuantizationError, match=r"sensitivity.json holds no sensitivities"):
        load_report(tmp_path)


def test_provenance_names_what_made_it_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    found = provenance("digits")
    assert (found["data"], found["seed"]) == ("digits", "7")
    assert f"torch {torch.__version__}" in found["versions"]
    assert provenance(seed=3)["seed"] == "3"
    told = command(["/env/bin/python", "/env/bin/lq-search", "search.storage=postgresql://me:s3cret@host/db"])
    assert told == "lq-search search.storage=postgresql://me:***@host/db"


def test_a_command_shows_no_key_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    words = ["lq-train", "--wandb-api-key=abc", "logger.token=s3cret", "--api_key", "hunter2", "trainer.max_epochs=3"]
    assert command(words) == "lq-train --wandb-api-key=*** logger.token=*** --api_key *** trainer.max_epochs=3"
    told = command(
        ["python", "lq-train", "data.root=/home/jane/sets", "/home/jane", "/home/janet/x", "--out=/home/jane/a b"]
    )
    assert told == "lq-train data.root=~/sets ~ /home/janet/x '--out=~/a b'"
