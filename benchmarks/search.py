"""Search of ResNet-20's weight bits (2..8 a layer, inputs 8 bits): ours, with its default sampler and with steps from
the front (`refine`), against plain TPE, NSGA-II, greedy and uniform plans and ModelOpt's AutoQuantize
(`python -m benchmarks.peers install modelopt`); and of small networks whose true front is known.

    python -m benchmarks.search --json out.json          # 200 trials of ours, 1,000 of the others
    python -m benchmarks.search --space affine --methods ours refine fixed modelopt --json out.json  # zero points
    python -m benchmarks.search --enumerated --json out.json  # three networks of 512 plans, all known
    python -m benchmarks.search --deep --json out.json        # 60 layers
    python -m benchmarks.search --faults --json out.json # 4 workers on PostgreSQL, one killed every 20 s

Plans are scored on train images 1,024 to 3,024, which neither calibrate nor were used to choose a recipe; then the best
plan of each size is scored on the 10,000 test images. Hypervolumes have the reference point (accuracy 0.1, 8.2 bits).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from lightning import LightningDataModule, Trainer
from optuna.samplers import NSGAIISampler, TPESampler
from optuna.trial import TrialState
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import common
from benchmarks.peers.process import PeerProcess
from benchmarks.search_fronts import METHODS as FRONT_METHODS, deep, enumerated
from benchmarks.search_nets import Classifier
from lq_plugin.demo.cifar10 import load_images, normalize
from lq_plugin.demo.resnet import load_resnet
from lq_plugin.search import Evaluator, ModelSpace, SurrogateSampler, search, tpe
from lq_plugin.search.sensitivity.measure import measure_sensitivity
from lq_plugin.search.shared.interrupt import stop_on_signal
from lq_plugin.search.study.seeds import greedy_path, unit_costs

SPACE: dict[str, Any] = {
    "weight": {"bit_widths": [2, 3, 4, 5, 6, 7, 8], "granularities": ["per_channel"], "ranges": ["mse"]},
    "input": "uint8 affine mse",
}
#: Of weights: symmetric alone, or each also with zero points.
SPACES = {
    "symmetric": SPACE,
    "affine": SPACE | {"weight": [SPACE["weight"] | {"affine": True}, SPACE["weight"]]},
}
#: What plans are compared by: bits of a weight of the layers that a plan can change.
BITS = "quantizable_effective_bits"
CALIBRATION, IMAGES = 1024, 2000
BUDGETS = (4.0, 3.5, 3.0)
REFERENCE = (0.1, 8.2)
METHODS = ("ours", "refine", "fixed", "modelopt", "tpe", "nsga2")
CPU = partial(Trainer, accelerator="cpu", devices=1)


class Images(LightningDataModule):
    """Train images: the first to calibrate with, the next to score plans on."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__()
        images, self.labels = load_images(folder, "train", 0, CALIBRATION + count)
        self.images = normalize(images)

    def _loader(self, start: int, stop: int | None, size: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images[start:stop], self.labels[start:stop]), size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0, CALIBRATION, 128)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(CALIBRATION, None, 250)


def hypervolume(points: list[tuple[float, float]]) -> float:
    """Area between the front of `(accuracy, bits)` and the reference point; accuracy is maximized, bits are minimized.

    >>> round(hypervolume([(0.6, 4.2), (0.9, 6.2), (0.5, 5.2)]), 2)
    2.6
    """
    area, best = 0.0, REFERENCE[0]
    # From few bits to many: each plan adds the strip by which it is more accurate than all smaller ones.
    for accuracy, bits in sorted(points, key=lambda p: (p[1], -p[0])):
        if accuracy > best and bits < REFERENCE[1]:
            area += (accuracy - best) * (REFERENCE[1] - bits)
            best = accuracy
    return area


def curve(points: list[tuple[float, float]], seconds: list[float]) -> dict[str, Any]:
    """Hypervolume after 50, 100, 200, ... trials, and over the seconds that they took."""
    counts = [n for n in (25, 50, 100, 200, 400, 700, 1000) if n < len(points)] + [len(points)]
    total = [sum(seconds[:n]) for n in counts]
    return {
        "hypervolume": {str(n): round(hypervolume(points[:n]), 5) for n in counts},
        "over_seconds": [[round(t, 1), round(hypervolume(points[:n]), 5)] for t, n in zip(total, counts, strict=True)],
    }


def best_plan(plans: list[tuple[float, float, Any]], budget: float) -> Any:
    """The most accurate of `(accuracy, bits, plan)` within a budget, or None."""
    fitting = [plan for plan in plans if plan[1] <= budget + 1e-9]
    return max(fitting, key=lambda plan: (plan[0], -plan[1]))[2] if fitting else None


def distinct_params(space: ModelSpace, chosen: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Returns parameters for bits by layer, each plan once; a layer that has none gets the most bits.

    Of choices with the same bits the first one, which has zero points where there are any.

    Args:
        space: of weights.
        chosen: bits of each layer's weights, by plan.
    """
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    units = [unit for unit in space.units if len(unit.choices) > 1]
    for bits in chosen:
        wanted = tuple(bits.get(unit.layers[0].removeprefix("net."), max(space.bit_widths)) for unit in units)
        choices = [next(c for c in u.choices if c.bit_width == b) for u, b in zip(units, wanted, strict=True)]
        found[wanted] = {k: v for u, c in zip(units, choices, strict=True) for k, v in u.params(c).items()}
    return list(found.values())


class Comparison:
    """All methods on one model and one set of images."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.space = SPACES[options.space]
        self.net = load_resnet(options.data / "resnet_cifar10" / "resnet20_jpeg.safetensors", 20)
        self.data = Images(options.data, options.images)
        images, self.test_labels = load_images(options.data, "test")
        self.test_images = normalize(images)
        self.plans: dict[str, list[tuple[float, float, Any]]] = {}
        self.results: dict[str, Any] = {
            "images": options.images,
            "space": self.space,
            "reference": REFERENCE,
            "hypervolume": {},
            "curves": {},
        }

    def run(self) -> dict[str, Any]:
        options = self.options
        ours: dict[str, dict[str, Any]] = {"ours": {"sampler": SurrogateSampler}, "refine": {"sampler": tpe}}
        for name, given in ours.items():
            if name in options.methods:
                with tempfile.TemporaryDirectory() as folder:
                    self.method(name, options.trials, storage=f"sqlite:///{folder}/study.db", **given)
        if "fixed" in options.methods:
            self.fixed_plans()
        if "modelopt" in options.methods:
            self.peer_plans()
        if self.plans:
            self.score()
        for name, sampler in (("tpe", TPESampler), ("nsga2", NSGAIISampler)):
            if name in options.methods:
                self.method(name, options.trials_plain, seeds=0, uniform=False, sampler=sampler)
        return self.results

    def method(self, name: str, n_trials: int, **given: Any) -> None:
        """One search from start to end, sensitivity included."""
        with common.Stopwatch() as watch:
            result = search(
                Classifier(self.net),
                self.data,
                self.space,
                "val/acc",
                n_trials,
                cost=BITS,
                trainer=CPU,
                study_name=name,
                progress=False,
                **given,
            )
        trials = [t for t in result.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        ends = [t.datetime_complete.timestamp() for t in trials if t.datetime_complete]
        starts = [t.datetime_start.timestamp() for t in trials if t.datetime_start]
        seconds = [end - before for end, before in zip(ends, [starts[0], *ends[:-1]], strict=True)]
        points = [(c.metric, c.cost) for c in result.candidates]
        self.plans[name] = [(c.metric, c.cost, c.plan) for c in result.candidates]
        found = curve(points, seconds)
        self.results["hypervolume"][name] = found["hypervolume"]
        self.results["curves"][name] = {
            "over_seconds": found["over_seconds"],
            "seconds": watch.seconds,
            "seconds_before_first_trial": watch.seconds - sum(seconds),
            "seconds_per_trial": statistics.median(seconds),
        }
        if name == "ours":
            self.results["seconds_per_trial"] = statistics.median(seconds)
            self.results["trials_per_minute"] = 60.0 / statistics.median(seconds)
        self.note(f"{name}: {found['hypervolume']}")

    def fixed_plans(self) -> None:
        """Uniform plans and the greedy path; and what an evaluation forward pass takes."""
        with Evaluator(Classifier(self.net), self.data, trainer=CPU) as evaluator:
            space = evaluator.calibrate(self.space)
            table = measure_sensitivity(evaluator)
            base, costs = unit_costs(evaluator, BITS)
            path = [params for _, params in greedy_path(space, table.values, costs, base)]
            for name, plans in (("uniform", [space.uniform(bits) for bits in space.bit_widths]), ("greedy", path)):
                scored = [(evaluator.evaluate(plan := space.plan(params)), plan) for params in plans]
                self.plans[name] = [(e.metrics["val/acc"], getattr(e.cost, BITS), plan) for e, plan in scored]
                points = [(accuracy, bits) for accuracy, bits, _ in self.plans[name]]
                self.results["hypervolume"][name] = {str(len(points)): round(hypervolume(points), 5)}
                self.note(f"{name}: {self.results['hypervolume'][name]}")
            evaluator.apply(space.layer_plans(path[len(path) // 2]))
            batches = [batch[0] for batch in self.data.val_dataloader()]

            def forward() -> None:
                with torch.inference_mode():
                    for batch in batches:
                        evaluator.model(batch)

            evaluate = partial(evaluator.evaluate, space.plan(path[len(path) // 2]))
            times = common.interleaved({"trial": evaluate, "pass": forward}, rounds=5)
            self.results["evaluation_pass_seconds"] = statistics.median(times["pass"])
            self.results["evaluation_over_pass"] = common.ratio(times, "trial", "pass")
            evaluator.apply({})
            floats = common.interleaved({"float": forward}, rounds=5)
            self.results["float_pass_seconds"] = statistics.median(floats["float"])

    def peer_plans(self) -> None:
        """Scores what ModelOpt's AutoQuantize chooses for each budget: its bits, with our quantizers."""
        peer = PeerProcess(
            "modelopt", "benchmarks.peers.modelopt_search", (str(self.options.data.resolve()),), self.options.threads
        )
        chosen = [peer.ask(budget) for budget in peer.names]
        peer.close()
        with Evaluator(Classifier(self.net), self.data, trainer=CPU) as evaluator:
            space = evaluator.calibrate(self.space)
            plans = [space.plan(params) for params in distinct_params(space, chosen)]
            scored = [(evaluator.evaluate(plan), plan) for plan in plans]
        self.plans["modelopt"] = [(e.metrics["val/acc"], getattr(e.cost, BITS), plan) for e, plan in scored]
        points = [(accuracy, bits) for accuracy, bits, _ in self.plans["modelopt"]]
        self.results["hypervolume"]["modelopt"] = {str(len(points)): round(hypervolume(points), 5)}
        self.note(f"modelopt: {self.results['hypervolume']['modelopt']}")

    def score(self) -> None:
        """Test accuracy of the best plan of each size."""
        self.results["best_at"] = {}
        with Evaluator(Classifier(self.net), self.data, trainer=CPU) as evaluator:
            evaluator.calibrate(self.space)
            for budget in BUDGETS:
                row: dict[str, Any] = {}
                for name in ("ours", "refine", "uniform", "greedy", "modelopt"):
                    plan = best_plan(self.plans.get(name, []), budget)
                    if plan is not None:
                        evaluator.apply(evaluator.layer_plans(plan))
                        row[name] = round(self.test_accuracy(evaluator.model), 2)
                self.results["best_at"][str(budget)] = row
                self.note(f"at most {budget} bits: {row}")

    def test_accuracy(self, model: nn.Module) -> float:
        model.eval()
        pairs = zip(self.test_images.split(250), self.test_labels.split(250), strict=True)
        with torch.inference_mode():
            return 100.0 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(self.test_labels)

    def note(self, line: str) -> None:
        self.console.print(line, highlight=False)
        common.write_json(self.options.json, self.results, ("optuna",))


def work(url: str, worker: int, options: argparse.Namespace) -> None:
    """One worker of the fault run."""
    net = load_resnet(options.data / "resnet_cifar10" / "resnet20_jpeg.safetensors", 20)
    data = Images(options.data, options.images)
    search(
        Classifier(net),
        data,
        SPACE,
        "val/acc",
        options.trials,
        storage=url,
        worker=worker,
        heartbeat=3,
        seeds=0,
        trainer=CPU,
        progress=False,
    )


def faults(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Workers on a PostgreSQL of our own; one is killed every `--kill-every` seconds and started again."""
    kills, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, stop_on_signal() as stop:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        import pgserver

        server = pgserver.get_server(f"{folder}/data")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg2://")
        flags = [
            "--data",
            str(options.data),
            "--images",
            str(options.images),
            "--trials",
            str(options.trials),
            "--worker-url",
            url,
        ]

        def launch(number: int) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "benchmarks.search", *flags, "--worker", str(number)]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        workers = [launch(number) for number in range(4)]
        numbers, last_kill = 4, time.monotonic()
        while any(worker.poll() is None for worker in workers) and not stop:
            time.sleep(0.5)
            alive = [index for index, worker in enumerate(workers) if worker.poll() is None]
            if time.monotonic() - last_kill > options.kill_every and alive:
                victim = alive[kills % len(alive)]
                workers[victim].send_signal(signal.SIGKILL)
                workers[victim].wait()
                kills, last_kill = kills + 1, time.monotonic()
                workers[victim] = launch(numbers)
                numbers += 1
        for worker in workers:
            worker.wait()
        study = optuna.load_study(study_name="lq_search", storage=url)
        trials = study.get_trials(deepcopy=False)
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        result = {
            "complete": len(complete),
            "distinct": len({frozenset(t.params.items()) for t in complete}),
            "failed": sum(t.state == TrialState.FAIL for t in trials),
            "retried": sum(bool(t.system_attrs.get("retry_history")) for t in trials),
            "running": sum(t.state == TrialState.RUNNING for t in trials),
            "kills": kills,
            "seconds": time.monotonic() - started,
        }
        server.cleanup()
    console.print(result)
    return {"faults": result}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help=f"score plans on N train images (default: {IMAGES})"
    )
    parser.add_argument("--trials", type=int, default=200, metavar="N", help="of ours and refine (default: 200)")
    parser.add_argument(
        "--trials-plain",
        type=int,
        default=1000,
        metavar="N",
        help="of TPE and of NSGA-II without seeds (default: 1000)",
    )
    message = "what to run (default: all); fixed are the uniform plans and the greedy path"
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help=message)
    parser.add_argument(
        "--space",
        choices=[*SPACES],
        default="symmetric",
        help="weights of ResNet-20 (default: symmetric); affine: or with zero points",
    )
    parser.add_argument("--enumerated", action="store_true", help="three networks of 512 plans instead")
    parser.add_argument("--deep", action="store_true", help="a network of 60 layers instead")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of the search, with --enumerated (default: 3)"
    )
    message = "seeds of the networks' training, with --enumerated (default: 3)"
    parser.add_argument("--networks", type=int, default=3, metavar="N", help=message)
    message = "with --enumerated and --deep (default: all)"
    parser.add_argument(
        "--methods-of-fronts", nargs="+", choices=[*FRONT_METHODS], default=[*FRONT_METHODS], help=message
    )
    message = "with --enumerated and --deep: keep the scores of plans here, for the next run"
    parser.add_argument("--scores", type=Path, metavar="FOLDER", help=message)
    parser.add_argument("--faults", action="store_true", help="kill workers instead")
    parser.add_argument(
        "--kill-every", type=float, default=20.0, metavar="SECONDS", help="in the fault run (default: 20)"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker-url", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    console = Console()
    if options.worker is not None:
        work(options.worker_url, options.worker, options)
        return {}
    if options.enumerated or options.deep:
        results = (enumerated(options, console) if options.enumerated else {}) | (
            deep(options, console) if options.deep else {}
        )
    else:
        results = faults(options, console) if options.faults else Comparison(options, console).run()
    common.write_json(options.json, results, ("optuna",))
    return results


if __name__ == "__main__":
    main()
