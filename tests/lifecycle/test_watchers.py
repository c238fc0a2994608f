"""Watchers of a run and what steers its loops see no hook, batch or line more than without the plugin."""

import csv
import inspect

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    RichProgressBar,
    ThroughputMonitor,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lq_plugin import PTQ, QAT
from lq_plugin.model.prepare import quantized_layers
from tests.callbacks.conftest import Module

STAGES = ("validate", "test", "predict")
ADDED = {"fit": lambda: QAT("w8a8"), **dict.fromkeys(STAGES, lambda: PTQ("w8a8"))}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You have overridden"),
]


class Steps(Module):
    """Every loop's step, and what each prints."""

    def training_step(self, batch, batch_idx):
        self.print(f"train {batch_idx}")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val/loss", self(batch[0]).square().mean())

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test/loss", self(batch[0]).square().mean())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0])


class Hooks(L.Callback):
    """Every call of a hook, with the index of its batch."""

    def __init__(self):
        self.calls = []
        for name, hook in inspect.getmembers(L.Callback, inspect.isfunction):
            if name.startswith(("on_", "setup", "teardown")) and "checkpoint" not in name:
                setattr(self, name, self.noting(name, "batch_idx" in inspect.signature(hook).parameters))

    def noting(self, name, has_batch):
        def hook(*args, **kwargs):
            index = next((part for part in reversed(args) if isinstance(part, int)), None) if has_batch else None
            self.calls.append((name, index))

        return hook


def run(make, data, fn, *watching, added=True, **options):
    """The module after a run of one loop with all watching callbacks, ours last."""
    L.seed_everything(0, verbose=False)
    module = Steps()
    fit = make(*watching, *([ADDED[fn]()] if added else []), **options)
    answer = getattr(fit, fn)(module, datamodule=data, **({} if fn in ("fit", "predict") else {"verbose": False}))
    assert bool(list(quantized_layers(module))) == added
    return fit, module, answer


@pytest.fixture
def splits(data):
    """Every loop has batches of its own number."""
    data.test_dataloader = lambda: DataLoader(data.val_dataloader().dataset, batch_size=4)
    data.predict_dataloader = lambda: DataLoader(data.val_dataloader().dataset, batch_size=11)
    return data


FLAGS = {
    "plain": {},
    "limits": {"limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 0.5, "limit_predict_batches": 2},
    "no validation": {"limit_val_batches": 0},
    "no sanity check": {"num_sanity_val_steps": 0},
    "whole sanity check": {"num_sanity_val_steps": -1},
    "fast_dev_run": {"fast_dev_run": 2},
    "barebones": {"barebones": True},
    "val_check_interval": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2},
    "overfit_batches": {"overfit_batches": 2},
    "max_steps": {"max_steps": 5, "max_epochs": -1},
    "max_time": {"max_time": {"hours": 1}},
    "accumulate": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "no inference mode": {"inference_mode": False},
    "anomalies": {"detect_anomaly": True},
    "deterministic": {"deterministic": True, "benchmark": False},
    "profiler": {"profiler": "simple"},
}


@pytest.mark.parametrize(
    "flags",
    [name if name in ("plain", "val_check_interval") else pytest.param(name, marks=pytest.mark.slow) for name in FLAGS],
)
@pytest.mark.filterwarnings("ignore:You are (sampling|overfitting)")
@pytest.mark.filterwarnings("ignore:Trainer.*overfit")
@pytest.mark.filterwarnings("ignore:.*[Aa]nomaly")
@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
def test_loops_call_the_hooks_that_they_call_without_us(flags, trainer, splits):
    """Steps taken, the names that are logged and the shape of predictions are the same, too."""
    options = FLAGS[flags]
    if flags == "barebones":  # refuses to be told what it switches off
        options = {**options, **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"))}
        options["enable_model_summary"] = None
    for fn in ("fit", *STAGES):
        seen = []
        for added in (False, True):
            hooks = Hooks()
            fit, _, answer = run(trainer, splits, fn, hooks, added=added, **options)
            shapes = [part.shape for part in answer or [] if isinstance(part, torch.Tensor)]
            seen.append((hooks.calls, fit.global_step, fit.current_epoch, sorted(fit.callback_metrics), shapes))
        assert seen[0] == seen[1], fn
        assert seen[0][0]


class Bars(L.Callback):
    """Description, number and total of each bar after each batch."""

    def __init__(self):
        self.seen = []

    def note(self, trainer, *_):
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            self.seen.append([(task.description, task.completed, task.total) for task in bar.progress.tasks])
        else:
            parts = [getattr(bar, f"_{name}_progress_bar") for name in ("train", "val", "predict")]
            self.seen.append([(part.n, part.total) for part in parts if part is not None])

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = note


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("fn", ["fit", *STAGES])
def test_progress_bars_count_the_batches_of_the_loops_alone(fn, bar, trainer, splits):
    seen = []
    for added in (False, True):
        run(trainer, splits, fn, bar(), bars := Bars(), added=added, enable_progress_bar=True)
        seen.append(bars.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 1


@pytest.mark.filterwarnings("ignore:When using the .ThroughputMonitor., you need to define")
def test_monitors_log_what_they_log_without_us(trainer, splits, tmp_path):
    """Rates, device and throughput: the same rows at the same steps, of samples of the loops alone."""
    seen = []
    for added in (False, True):
        logger = CSVLogger(tmp_path, version=str(added))
        monitors = [
            LearningRateMonitor("step", log_momentum=True, log_weight_decay=True),
            DeviceStatsMonitor(cpu_stats=True),
            ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), length_fn=lambda batch: batch[0].numel()),
        ]
        run(trainer, splits, "fit", *monitors, added=added, logger=logger, log_every_n_steps=1)
        logger.save()
        with open(logger.experiment.metrics_file_path, newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        counts = ("samples", "batches", "lengths", "lr-SGD", "momentum", "weight_decay", "step")
        seen.append([(sorted(row), [row[key] for key in sorted(row) if key.endswith(counts)]) for row in rows])
    assert seen[0] == seen[1]
    columns = {key for row, _ in seen[0] for key in row}
    assert {"train/samples", "validate/samples", "lr-SGD-momentum"} < columns
    assert any("cpu" in key for key in columns)


def test_what_a_step_prints_is_printed_once_a_step(trainer, splits, capsys):
    """A calibration of training batches runs the validation step: the training step does not print for it."""
    run(trainer, splits, "fit")
    assert capsys.readouterr().out.splitlines() == [f"train {index}" for _ in range(2) for index in range(4)]
