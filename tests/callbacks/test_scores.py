"""The scores of a model on a run's page: each is that of an evaluation of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lq_plugin import PTQ, QAT, QuantMonitor
from lq_plugin.callbacks.monitor.scores import Scoreboard
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.report import ReportData
from lq_plugin.report.data import ModelReport
from lq_plugin.report.scores import wilson

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def fit(folder: Path, model: DigitsCNN, monitor: QuantMonitor, **options: Any) -> ReportData:
    logger = CSVLogger(folder, name="run", version="only")
    trainer = Trainer(
        max_epochs=1, limit_train_batches=4, callbacks=[QAT("w2"), monitor], logger=logger, **QUIET, **options
    )
    trainer.fit(model, datamodule=DigitsDataModule())
    return ReportData.load(folder / "run" / "only" / "quant" / "report.json")


def model_of(report: ReportData) -> ModelReport:
    assert report.model is not None
    return report.model


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_ptq_before_the_first_step_and_qat_after_the_last(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = DigitsCNN(width=8)
    before = copy.deepcopy(model)
    monitor = QuantMonitor(images=False, scores={"float": {"val/acc": 0.75}})
    report = fit(tmp_path, model, monitor, num_sanity_val_steps=-1)
    found = {s.variant: s for s in model_of(report).scores if s.metric == "val/acc"}
    assert list(found) == ["float", "PTQ", "QAT"]
    # The same plan on the same weights, in a Trainer of its own.
    (alone,) = Trainer(callbacks=[PTQ("w2")], logger=False, **QUIET).validate(
        before, datamodule=DigitsDataModule(), verbose=False
    )
    assert found["PTQ"].value == pytest.approx(alone["val/acc"], abs=1e-6)
    (after,) = Trainer(callbacks=[QAT("w2")], logger=False, **QUIET).validate(
        model, datamodule=DigitsDataModule(), verbose=False
    )
    assert found["QAT"].value == pytest.approx(after["val/acc"], abs=1e-6)
    for score in found.values():
        assert score.samples == 360
        assert (score.low, score.high) == wilson(round(360 * score.value), 360)
    assert report.provenance["data"] == "DigitsDataModule, 360 samples evaluated"
    assert torch.__version__ in report.provenance["versions"]
    for layer in model_of(report).layers:
        assert set(layer.output_db) == {"alone", "along"}
    assert model_of(report).totals["activation_bytes"] == model_of(report).totals["float_activation_bytes"]


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_short_sanity_check_is_no_score(tmp_path: Path) -> None:
    report = fit(tmp_path, DigitsCNN(width=4), QuantMonitor(images=False), limit_val_batches=3)
    found = [s for s in model_of(report).scores if s.metric == "val/acc"]
    assert [(s.variant, s.samples) for s in found] == [("QAT", 3 * DigitsDataModule().batch_size)]


class Logging(DigitsCNN):
    """Logs an accuracy of its training under the name of one of an evaluation, and a constant in both."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log_dict({"acc": 1.0, "both_acc": 0.25}, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("both_acc", 0.25)
        super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_what_the_training_logs_is_no_score(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version="only")
    monitor = QuantMonitor(images=False)
    trainer = Trainer(max_epochs=2, limit_train_batches=2, callbacks=[QAT("w2"), monitor], logger=logger, **QUIET)
    trainer.fit(Logging(width=4), datamodule=DigitsDataModule())
    assert float(trainer.callback_metrics["acc"]) == 1
    assert "acc" not in monitor.scoreboard.by_variant["QAT"]
    assert {"val/acc", "both_acc"} <= set(monitor.scoreboard.by_variant["QAT"])
    assert monitor.scoreboard.samples["both_acc"] == 360


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_before_its_schedule_starts_a_qat_is_the_float_model(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = DigitsCNN(width=8)
    (alone,) = Trainer(logger=False, **QUIET).validate(
        copy.deepcopy(model), datamodule=DigitsDataModule(), verbose=False
    )
    monitor = QuantMonitor(images=False)
    plan = {
        "rules": [{"match": "*", "weight": "int2", "input": "uint2 affine"}],
        "schedule": {"weights_start": "epoch 1", "activations_start": "epoch 1"},
    }
    for epochs, wanted in ((1, {"float"}), (2, {"float", "QAT"})):
        trainer = Trainer(
            max_epochs=epochs, limit_train_batches=2, callbacks=[QAT(plan), monitor], num_sanity_val_steps=-1,
            logger=CSVLogger(tmp_path, name="run", version=str(epochs)), **QUIET,
        )  # fmt: skip
        trainer.fit(copy.deepcopy(model), datamodule=DigitsDataModule())
        assert set(monitor.scoreboard.by_variant) == wanted
        assert monitor.scoreboard.by_variant["float"]["val/acc"] == pytest.approx(alone["val/acc"], abs=1e-6)


def test_several_loaders_have_no_count_and_odd_scores_are_refused() -> None:
    board = Scoreboard({"float": {"val/acc": 1}})

    class Run:
        sanity_checking, num_sanity_val_steps, world_size, lightning_module = False, 2, 1, torch.nn.Linear(2, 2)

    run: Any = Run()
    run.callback_metrics = {"acc": torch.tensor(1.0)}
    board.start(run)
    board.see(torch.zeros(4, 2), 0)
    board.see(torch.zeros(4, 2), 1)
    run.callback_metrics["val/acc"] = torch.tensor(0.5)
    board.end(run, PTQ("w8"))
    assert board.by_variant == {"float": {"val/acc": 1.0}, "PTQ": {"val/acc": 0.5}}
    assert board.samples == {}
    with pytest.raises(QuantizationError, match="scores are metrics by variant"):
        QuantMonitor(scores={"float": 0.9})  # type: ignore[dict-item]
