"""A small search and a small sweep, and what they found as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import torch
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.lq_sweeper import LQSweeperConf
from lq_plugin import QuantPlan
from lq_plugin.search import SearchResult, search
from lq_plugin.search.sweep.job import TrialJob
from lq_plugin.search.sweep.settings import SweepSettings
from lq_plugin.search.sweep.sweep import sweep
from tests.compatibility.families import Data, Module

SPACE = {
    "weight": {"bit_widths": [2, 8], "granularities": ["per_channel", "group8"], "ranges": ["mse"]},
    "input": ["uint8 affine mse", "float"],
}
LAYERS = {
    "plan": "w8a8",
    "rules": [{"match": "conv*", "weight": {"bit_widths": [2, 4, 8]}}, {"match": "fc", "weight": ["int4", "float"]}],
}


def own_answers(module: Module, data: Data) -> Data:
    """Data whose targets are what the float model answers: its loss is the error of quantization."""
    with torch.no_grad():
        (answers,) = module(data.x).values()
    return Data(data.x, answers)


def run_search(module: Module, data: Data, folder: Path, n_trials: int) -> SearchResult:
    """Go on to `n_trials` trials of the study in `folder`."""
    return search(
        module, data, SPACE, metric="val/loss", mode="min", n_trials=n_trials, output_dir=folder, seeds=1,
        calibration_batches=2, progress=False, trainer=partial(L.Trainer, accelerator="cpu", devices=1),
    )  # fmt: skip


def searched(result: SearchResult) -> dict[str, Any]:
    """Returns the findings of a search as plain values."""
    candidates = [
        {
            "number": c.number,
            "plan": c.plan.to_dict(),
            "metric": c.metric,
            "cost": c.cost,
            "origin": c.origin,
            "metrics": dict(c.metrics),
        }
        for c in result.candidates
    ]
    return {"candidates": candidates, "front": [c.number for c in result.front], "best": result.best().number}


def run_sweep(folder: Path, n_trials: int) -> list[dict[str, Any]]:
    """Go on to `n_trials` jobs of the sweep in `folder`; all trials as plain values."""
    sweeper = OmegaConf.merge(
        OmegaConf.structured(LQSweeperConf), {"n_trials": n_trials, "params": {"x": "interval(0, 1)"}, "layers": LAYERS}
    )
    config: DictConfig = OmegaConf.create(
        {
            "hydra": {"sweep": {"dir": str(folder)}, "sweeper": sweeper},
            "callbacks": {"lq_qat": {"plan": "w4a8"}},
            "x": 0,
        }
    )
    settings = SweepSettings.from_config(config)

    def task(cfg: dict[str, str]) -> float:
        rule = QuantPlan.from_yaml(cfg["callbacks.lq_qat.plan"].strip("'")).rules[1]
        return float(cfg["x"]) + rule.weight.bit_width  # type: ignore[union-attr]

    job = TrialJob.wrapping(task, settings.study_access)

    def launch(overrides: Sequence[Sequence[str]], first: int) -> None:
        for number, lines in enumerate(overrides, first):
            job.run(number, dict(line.split("=", 1) for line in lines))

    sweep(settings, [], config, None, launch, lambda batch: None)
    study = optuna.load_study(study_name=settings.study_name, storage=f"sqlite:///{folder / 'study.db'}")
    return [
        {"params": t.params, "values": t.values, "attributes": t.user_attrs} for t in study.get_trials(deepcopy=False)
    ]
