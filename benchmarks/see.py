"""Cost of looking: a log of `QuantMonitor` over a training step, and the report page of a large study.

    python -m benchmarks.see --json out.json

ResNet-20 trains on random 32 × 32 images, batch 128, with `QAT`; `QuantMonitor` logs to CSV every fourth step, in a
second fit that takes turns with one without it. `log_over_step` is the time that a log adds, over the median step of
the fit without; `per_100` what that is of a run with one log every 100 steps. `start` and `end` are pictures and page,
over the same step.

`page` is that of a model of 100 layers and a study of 500 trials: bytes, and seconds from the two to the file, the
model's making and calibration included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import common
from lq_plugin import QAT, QuantMonitor
from lq_plugin.demo.resnet import CifarResNet, LitClassifier
from lq_plugin.report import write_page
from tests.report.synthetic import large_report

PLANS = ("w4a8", "ttq / uint8 affine lsq")
EVERY, BATCH = 4, 128
LAYERS, TRIALS = 100, 500


class Clock(Callback):
    """Seconds from one batch's start to the next one's, what callbacks do in between included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.before: float | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        now = time.perf_counter()
        if self.before is not None:
            self.seconds.append(now - self.before)
        self.before = now


class Timed(QuantMonitor):
    """Notes how long the first and the last report take."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.moments: dict[str, float] = {}

    def _log(self, trainer: Trainer, pl_module: Any, moment: str) -> None:
        with common.Stopwatch() as watch:
            super()._log(trainer, pl_module, moment)
        self.moments[moment] = watch.seconds


def fit(plan: str, batches: int, monitor: Timed | None, folder: str) -> list[float]:
    """Seconds of the steps of one fit."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH * batches, 3, 32, 32), torch.randint(0, 10, (BATCH * batches,))
    clock = Clock()
    # The clock stands first, so that what the monitor does at the start of a batch counts.
    callbacks: list[Callback] = [QAT(plan), clock, *([] if monitor is None else [monitor])]
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(folder)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=callbacks, logger=logger, log_every_n_steps=1, **quiet
    )
    trainer.fit(LitClassifier(CifarResNet(20)), DataLoader(TensorDataset(images, labels), BATCH))
    return clock.seconds


def measure_log(plan: str, batches: int, rounds: int) -> dict[str, Any]:
    """One row: what a log costs under this plan."""
    steps: list[float] = []
    logged: list[float] = []
    others: list[float] = []
    moments: dict[str, list[float]] = {"start": [], "end": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            steps += fit(plan, batches, None, folder)[1:]
            monitor = Timed(every_n_epochs=None, every_n_steps=EVERY)
            watched = fit(plan, batches, monitor, folder)
        # The log of step n falls between the starts of batch n and n + 1.
        logged += watched[EVERY - 1 :: EVERY]
        others += [seconds for index, seconds in enumerate(watched) if index and index % EVERY != EVERY - 1]
        for moment, seconds in moments.items():
            seconds.append(monitor.moments[moment])
    step = statistics.median(steps)
    log = (statistics.median(logged) - statistics.median(others)) / step
    return {
        "plan": plan,
        "step_seconds": step,
        "other_steps": statistics.median(others) / step,
        "log_over_step": log,
        "per_100": log / 100,
        **{moment: statistics.median(seconds) / step for moment, seconds in moments.items()},
    }


def measure_page() -> dict[str, Any]:
    """Bytes and seconds of the large page."""
    with tempfile.TemporaryDirectory() as folder:
        with common.Stopwatch() as watch:
            path = write_page(large_report(TRIALS, LAYERS), Path(folder, "report.html"))
        return {"layers": LAYERS, "trials": TRIALS, "bytes": path.stat().st_size, "seconds": watch.seconds}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__, data=False)
    parser.add_argument("--batches", type=int, default=24, metavar="N", help="of a fit (default: 24)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="fits of each kind (default: 3)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    console = Console()
    results: dict[str, Any] = {"page": measure_page(), "logs": []}
    console.print(results["page"])
    for plan in PLANS:
        results["logs"].append(measure_log(plan, options.batches, options.rounds))
        console.print(results["logs"][-1])
        common.write_json(options.json, results)
    return results


if __name__ == "__main__":
    main()
