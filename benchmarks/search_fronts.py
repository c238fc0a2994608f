"""Searches where the true front is known, and on 60 layers: `python -m benchmarks.search --enumerated` and `--deep`.

Every method goes the same way through `lq_plugin.search`, with the same budget of distinct plans; plans are evaluated
once and looked up after that. `surrogate` and `refine` begin with uniform plans and those of sensitivities; `tpe`,
`nsga2` and `gp` are Optuna's samplers from nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler
from rich.console import Console

from benchmarks import common
from benchmarks.search_nets import COST, CPU, DEEP_SPACE, SMALL, SMALL_SPACE, Classifier, Digits, trained
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.search import SearchConfig, SurrogateSampler, tpe
from lq_plugin.search.evaluation.evaluator import Evaluation, Evaluator
from lq_plugin.search.shared.database import quiet
from lq_plugin.search.shared.interrupt import StopRequest
from lq_plugin.search.study.worker import StudyWorker
from lq_plugin.utilities.files import write_file

METRIC = "val/acc"
#: Trials after which fronts are compared.
MARKS = (40, 100)
DEEP_MARKS = (50, 100, 200)
Points = list[tuple[float, float]]


def gp(seed: int) -> BaseSampler:
    with quiet():
        return GPSampler(seed=seed)


_PLAIN: dict[str, Any] = {"seeds": 0, "uniform": False}
METHODS: dict[str, dict[str, Any]] = {
    "surrogate": {"sampler": SurrogateSampler},
    "pairs": {"sampler": SurrogateSampler, "pairs": 64},
    "refine": {"sampler": tpe},
    "tpe": {"sampler": tpe, **_PLAIN},
    "nsga2": {"sampler": partial(NSGAIISampler, population_size=20), **_PLAIN},
    "gp": {"sampler": gp, **_PLAIN},
}


class Scores:
    """Scores of plans of one network, in memory and, if a folder is given, in a file of it."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self.path = None if folder is None else folder / f"{name}.json"
        known = json.loads(self.path.read_text()) if self.path is not None and self.path.exists() else {}
        self.metrics: dict[str, dict[str, float]] = known
        #: That evaluations took.
        self.seconds = 0.0

    def remembered(self, evaluator: Evaluator) -> None:
        """Let an evaluator look up what is known."""
        evaluate = evaluator.evaluate_layers

        def look_up(layer_plans: Mapping[str, LayerPlan]) -> Evaluation:
            key = ", ".join(f"{name}: {plan.weight} / {plan.input}" for name, plan in sorted(layer_plans.items()))
            if key not in self.metrics:
                found = evaluate(layer_plans)
                self.metrics[key], self.seconds = found.metrics, self.seconds + found.seconds
            return Evaluation(self.metrics[key], evaluator.cost(layer_plans), 0.0)

        vars(evaluator)["evaluate_layers"] = look_up

    def keep(self) -> None:
        """Write the file."""
        if self.path is not None:
            write_file(self.path, json.dumps(self.metrics) + "\n")


def searched(
    model: Classifier, space: dict[str, Any], scores: Scores, n_trials: int, seed: int, **given: Any
) -> tuple[Points, float]:
    """Returns `(accuracy, bits)` of each plan as it was found, and the seconds a trial took without its evaluation.

    Args:
        model: trained.
        space: of the plans.
        scores: that are known.
        n_trials: distinct plans.
        seed: of the search.
        given: further fields of `SearchConfig`.
    """
    config = SearchConfig(
        model, Digits(), space, METRIC, n_trials, cost=COST, trainer=CPU, seed=seed, progress=False, **given
    )
    worker = StudyWorker(config)
    scores.remembered(worker.evaluator)
    with worker.evaluator:
        worker.open()
        worker.seed()
        before = scores.seconds
        with common.Stopwatch() as watch:
            worker.run(StopRequest())
        points = [(c.metric, c.cost) for c in worker.result().candidates]
    return points, (watch.seconds - (scores.seconds - before)) / len(points)


def front_of(points: Points) -> set[tuple[float, float]]:
    """Returns the points that no other is better than.

    >>> sorted(front_of([(0.5, 2.0), (0.9, 4.0), (0.4, 3.0), (0.9, 5.0)]))
    [(0.5, 2.0), (0.9, 4.0)]
    """
    return {p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)}


def volume(points: Points, reference: tuple[float, float]) -> float:
    """Returns the area between a front and `(accuracy, bits)`."""
    area, best = 0.0, reference[0]
    for accuracy, bits in sorted(front_of(points), key=lambda p: p[1]):
        if accuracy > best and bits < reference[1]:
            area, best = area + (accuracy - best) * (reference[1] - bits), accuracy
    return area


def every_plan(model: Classifier, scores: Scores) -> Points:
    """Returns `(accuracy, bits)` of all plans of a small network, and keeps their scores."""
    with Evaluator(model, Digits(), trainer=CPU) as evaluator:
        space = evaluator.calibrate(SMALL_SPACE)
        scores.remembered(evaluator)
        units = [unit for unit in space.units if len(unit.choices) > 1]
        found = []
        for choices in itertools.product(*(unit.choices for unit in units)):
            params = {k: v for u, c in zip(units, choices, strict=True) for k, v in u.params(c).items()}
            scored = evaluator.evaluate_layers(space.layer_plans(params))
            found.append((scored.metrics[METRIC], getattr(scored.cost, COST)))
    scores.keep()
    return found


def pass_seconds(model: Classifier, space: dict[str, Any]) -> float:
    """Returns the median time of an evaluation of a plan."""
    with Evaluator(model, Digits(), trainer=CPU) as evaluator:
        bound = evaluator.calibrate(space)
        plans = bound.layer_plans(bound.uniform(4))
        evaluator.evaluate_layers(plans)
        return statistics.median(evaluator.evaluate_layers(plans).seconds for _ in range(5))


def enumerated(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Shares of the true front that each method finds, and of its hypervolume."""
    results: dict[str, Any] = {"space": SMALL_SPACE, "plans": 512, "seeds": options.seeds, "networks": {}}
    totals: dict[str, list[tuple[list[float], list[float]]]] = {}
    for net, net_seed in itertools.product(SMALL, range(options.networks)):
        name = f"{net} {net_seed}"
        model, scores = trained(net, net_seed), Scores(name, options.scores)
        every = every_plan(model, scores)
        front, reference = front_of(every), (0.1, max(bits for _, bits in every) * 1.02)
        whole = volume(every, reference)
        row: dict[str, Any] = {"front": len(front), "evaluation_seconds": pass_seconds(model, SMALL_SPACE)}
        for method in options.methods_of_fronts:
            hits, volumes, times = [], [], []
            for seed in range(options.seeds):
                points, seconds = searched(model, SMALL_SPACE, scores, MARKS[-1], seed, **METHODS[method])
                hits.append([len(set(points[:mark]) & front) for mark in MARKS])
                volumes.append([round(volume(points[:mark], reference) / whole, 5) for mark in MARKS])
                times.append(seconds)
                totals.setdefault(method, []).append(([h / len(front) for h in hits[-1]], volumes[-1]))
            row[method] = {"found": hits, "hypervolume": volumes, "overhead_seconds": statistics.median(times)}
            console.print(f"{name}, front of {len(front)}, {method}: {row[method]}", highlight=False)
        results["networks"][name] = row
    results["trials"] = MARKS
    results["summary"] = {
        method: {
            "share_of_front_median": [statistics.median(r[0][i] for r in runs) for i in range(len(MARKS))],
            "share_of_front_least": [min(r[0][i] for r in runs) for i in range(len(MARKS))],
            "hypervolume_median": [statistics.median(r[1][i] for r in runs) for i in range(len(MARKS))],
            "hypervolume_least": [min(r[1][i] for r in runs) for i in range(len(MARKS))],
        }
        for method, runs in totals.items()
    }
    for method, found in results["summary"].items():
        console.print(f"{method}: {found}", highlight=False)
    return {"enumerated": results}


def deep(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Hypervolume that each method reaches on 60 layers."""
    model, scores = trained("deep"), Scores("deep", options.scores)
    results: dict[str, Any] = {"space": DEEP_SPACE, "layers": 60, "trials": DEEP_MARKS, "reference": (0.1, 8.2)}
    results["evaluation_seconds"] = pass_seconds(model, DEEP_SPACE)
    for method in options.methods_of_fronts:
        if method == "gp":
            continue  # for about ten dimensions at most
        started = time.perf_counter()
        points, seconds = searched(model, DEEP_SPACE, scores, DEEP_MARKS[-1], 0, **METHODS[method])
        scores.keep()
        results[method] = {
            "hypervolume": [round(volume(points[:mark], (0.1, 8.2)), 5) for mark in DEEP_MARKS],
            "overhead_seconds": seconds,
            "seconds": time.perf_counter() - started,
        }
        console.print(f"60 layers, {method}: {results[method]}", highlight=False)
    return {"deep": results}
