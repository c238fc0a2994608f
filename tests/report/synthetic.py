"""A study of 500 trials on 100 layers, and the report of such a model, without training anything."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import optuna
import torch
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import create_trial
from torch import nn

import lq_plugin
from lq_plugin.intent.plan import QuantPlan, Rule
from lq_plugin.model.calibrate import collect_statistics, load_statistics
from lq_plugin.model.graph.record import record
from lq_plugin.report import ReportData, model_report
from lq_plugin.report.data import Series
from lq_plugin.report.joined import joined
from lq_plugin.search import study_report
from lq_plugin.search.shared.database import quiet
from lq_plugin.search.shared.storage import FINGERPRINT
from lq_plugin.search.study.result import SearchResult

PLAN = {
    "rules": [
        {"match": "*", "weight": "int4 per_channel", "input": "uint8 affine"},
        {"match": "body.0", "weight": "int8 per_channel"},
        {"match": "body.*[14]", "weight": "int3 per_channel mse"},
        {"match": "head", "weight": "int4 group8", "input": "float"},
    ],
    "schedule": {"activations_start": "epoch 1", "batch_norm_freeze": "step 300"},
}


class Deep(nn.Module):
    """Convolutions in a row, the last layer linear."""

    def __init__(self, layers: int = 100, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(layers - 1)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = torch.relu(layer(x)) * 1.5
        return self.head(x.mean((2, 3)))


def deep_report(layers: int = 100, width: int = 32, title: str = "Deep", answered: bool = False) -> ReportData:
    """`answered`: with scores, errors of outputs and provenance, and a layer of two bits."""
    chosen = (
        {**PLAN, "rules": [*PLAN["rules"], {"match": "body.3", "weight": "int2 per_channel"}]} if answered else PLAN
    )
    torch.manual_seed(0)
    model, x = Deep(layers, width), torch.randn(2, 3, 8, 8)
    recording = record(model, lambda: model(x))
    ledger = lq_plugin.prepare(model, chosen)
    statistics = collect_statistics(model, [x])
    load_statistics(model, statistics)
    ledger.add_recording(recording)
    steps = list(range(0, 600, 10))
    training = [
        Series(name, steps, [2.0 / (1 + s / 50) + shift for s in steps])
        for name, shift in (("train/loss", 0.0), ("val/loss", 0.1))
    ]
    training += [Series(f"quant_layer/body.{i}/input_max", steps, [3.0 + i + s / 400 for s in steps]) for i in range(6)]
    training += [
        Series(f"quant_layer/body.{i}/weight_{what}", steps[::3], [0.3 / (1 + i + s / 90) for s in steps[::3]])
        for i in range(min(layers - 1, 24))
        for what in ("zeros", "flips", "sqnr_db", "scale_min", "scale_max", "min", "max")
    ]
    training += [
        Series(f"quant/{kind}/loss", steps[::10], [1.9 / (1 + s / 50) for s in steps[::10]])
        for kind in ("float", "quantized")
    ]
    plan = QuantPlan.parse(chosen)
    sensitivity = {f"body.{i}": 1.0 / (1 + i) for i in range(layers - 1)}
    answers: dict[str, Any] = {}
    if answered:
        answers = {
            "run": lambda: model(x),
            "scores": {"float": {"val/acc": 0.955}, "PTQ": {"val/acc": 0.87}, "QAT": {"val/acc": 0.935}},
            "samples": 200,
            "provenance": {"made": "2026-01-02 03:04 UTC", "command": "lq-train", "seed": "0"},
        }
    return model_report(
        model, plan, ledger=ledger, recording=recording, statistics=statistics, training=training, epoch_steps=100,
        sensitivity=sensitivity, metrics={"val/acc": 0.912, "test/acc": 0.907}, title=title, **answers,
    )  # fmt: skip


def large_study(
    trials: int = 500, layers: int = 100, name: str = "large", storage: str | None = None, seed: int = 0
) -> SearchResult:
    rng = random.Random(seed)
    names = [f"body.{i}" for i in range(layers - 1)] + ["head"]
    with quiet():
        study = optuna.create_study(study_name=name, directions=["maximize", "minimize"], storage=storage)
    study.set_user_attr(FINGERPRINT, {"metric": "val/acc", "mode": "max", "cost": "effective_bits"})
    distributions = {f"{n}.weight.bits": IntDistribution(2, 8) for n in names}
    distributions["head.weight.scheme"] = CategoricalDistribution(["int per_channel mse", "int per_tensor minmax"])
    found = []
    for number in range(trials):
        uniform = number + 2 if number < 7 else None
        middle = rng.uniform(2, 8)
        bits = [uniform or min(8, max(2, round(rng.gauss(middle, 1.3)))) for _ in names]
        mean = sum(bits) / len(bits) + 0.12
        metric = 0.95 - 0.9 / mean**1.7 - 0.05 * (8 - bits[0]) / 8 - 0.03 * (8 - bits[-1]) / 8 + rng.gauss(0, 0.004)
        scheme = rng.choice(distributions["head.weight.scheme"].choices)  # type: ignore[attr-defined]
        plan = QuantPlan(
            [
                Rule(n, weight=f"int{b} per_channel mse", input="uint8 affine mse")
                for n, b in zip(names, bits, strict=True)
            ]
        )
        numbers = {"val/acc": metric, "effective_bits": mean, "bytes": mean * 1e6 / 8, "bops": mean * 8e9}
        attrs = {
            "plan": plan.to_dict(),
            "metrics": numbers,
            "seconds": 0.5,
            "origin": f"uniform {uniform} bits" if uniform else "sampled",
        }
        params = {f"{n}.weight.bits": b for n, b in zip(names, bits, strict=True)} | {"head.weight.scheme": scheme}
        found.append(create_trial(values=[metric, mean], params=params, distributions=distributions, user_attrs=attrs))
    study.add_trials(found)
    return SearchResult(study, "val/acc", ["effective_bits"], True, {"val/acc": 0.948}, 4_000_000)


def searched_report() -> ReportData:
    """A trained model of six layers and the search that its plan comes from, with outlying trials."""
    result = large_study(trials=60, layers=6)
    names = [f"body.{i}" for i in range(5)] + ["head"]
    harm = {
        f"{n}.weight": {f"int{b} per_channel mse": (1.0 + i) / 4**b for b in range(2, 9)} for i, n in enumerate(names)
    }
    result.study.set_user_attr("sensitivity", harm)
    result.study.set_user_attr("sensitivity_measure", "kl")
    study, model = study_report(result), deep_report(6, 16, "Searched", answered=True)
    assert study.study is not None
    assert model.model is not None
    plan = study.study.best[1].plan
    return joined(replace(model, model=replace(model.model, plan=plan)), study)


def large_report(trials: int = 500, layers: int = 100) -> ReportData:
    model, study = deep_report(layers), study_report(large_study(trials, layers))
    return ReportData("Deep, 100 layers, 500 trials", model.model, study.study)
