"""QuantMonitor follows scales, zeros, flips and losses over a run, and prints tables of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lq_plugin
from lq_plugin import PTQ, QAT, QuantMonitor
from lq_plugin.callbacks.monitor import callback as monitor_module
from lq_plugin.callbacks.monitor.live import MAX_POINTS, Flips, History, losses
from lq_plugin.callbacks.monitor.loggers import Report
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.report import ReportData


def layers_of(net: nn.Module) -> dict[str, Any]:
    return dict(quantized_layers(net))


@pytest.fixture
def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))


def test_flips_and_zeros_of_a_weight_that_is_moved_by_hand(pair: nn.Sequential) -> None:
    lq_plugin.prepare(pair, {"rules": [{"match": "0", "weight": "bwn"}, {"match": "1", "weight": "twn"}]})
    weight = pair[0].weight
    flips = Flips()
    first = flips.measure(layers_of(pair))
    assert set(first) == {"0/weight_zeros", "1/weight_zeros"}
    assert first["0/weight_zeros"] == 0.0
    magnitude = pair[1].weight.abs()
    assert first["1/weight_zeros"] == pytest.approx(float((magnitude <= 0.7 * magnitude.mean()).float().mean()))
    with torch.no_grad():
        weight[:2] *= -1
    second = flips.measure(layers_of(pair))
    assert second["0/weight_flips"] == 0.25
    assert second["1/weight_flips"] == 0.0
    assert flips.measure(layers_of(pair))["0/weight_flips"] == 0.0


def test_wider_weights_and_those_switched_off_have_none(pair: nn.Sequential) -> None:
    lq_plugin.prepare(pair, {"rules": [{"match": "0", "weight": "int4"}, {"match": "1", "weight": "sign"}]})
    layers = layers_of(pair)
    assert set(Flips().measure(layers)) == {"1/weight_zeros"}
    layers["1"].weight_quantizer.set_enabled(False)
    assert Flips().measure(layers) == {}


def test_stochastic_signs_draw_nothing(pair: nn.Sequential) -> None:
    lq_plugin.prepare(pair, "sign stochastic")
    flips, before = Flips(), torch.get_rng_state()
    flips.measure(layers_of(pair))
    assert flips.measure(layers_of(pair))["0/weight_flips"] == 0.0
    assert torch.equal(torch.get_rng_state(), before)
    assert pair.training
    assert layers_of(pair)["0"].weight_quantizer.training


def test_history_is_thinned_and_keeps_both_ends() -> None:
    history = History()
    for step in range(5 * MAX_POINTS):
        history.add(
            step,
            {"loss": 1.0 / (step + 1), "gone": float("nan"), "once": 1.0} if step == 7 else {"loss": 1.0 / (step + 1)},
        )
    (loss,) = history.series()
    assert len(loss.steps) <= MAX_POINTS
    assert loss.steps == sorted(set(loss.steps))
    assert (loss.steps[0], loss.steps[-1]) == (0, 5 * MAX_POINTS - 1)


class ReturnsMapping(DigitsCNN):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(self(batch[0]), batch[1])}


@pytest.mark.parametrize("kind", [DigitsCNN, ReturnsMapping])
def test_losses_are_those_of_the_same_batch_quantized_and_float(kind: type[DigitsCNN]) -> None:
    class Compare(Callback):
        found: dict[str, float]

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx != 1:
                return
            state = torch.get_rng_state()
            self.found = losses(trainer, pl_module, batch)
            assert torch.equal(torch.get_rng_state(), state)
            assert pl_module.training
            pl_module.eval()
            with torch.no_grad():
                self.quantized = float(pl_module.loss(pl_module(batch[0]), batch[1]))
                with float_forward(pl_module):
                    self.float = float(pl_module.loss(pl_module(batch[0]), batch[1]))
            pl_module.train()

    seed_everything(0, verbose=False)
    compare = Compare()
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=1,
        accelerator="cpu",
        callbacks=[QAT("w2a8"), compare],
        **quiet,
    )
    trainer.fit(kind(width=4), datamodule=DigitsDataModule())
    assert compare.found == {
        "quant/quantized/loss": pytest.approx(compare.quantized),
        "quant/float/loss": pytest.approx(compare.float),
    }
    assert compare.quantized != compare.float


def fit(tmp_path: Path, monitor: QuantMonitor, plan: str = "ttq / uint8 affine lsq", **options: Any) -> DigitsCNN:
    seed_everything(0, verbose=False)
    model = DigitsCNN(width=4)
    usual: dict[str, Any] = {
        "max_epochs": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    logger = CSVLogger(tmp_path, name="run", version="only")
    trainer = Trainer(
        callbacks=[QAT(plan), monitor], limit_train_batches=4, logger=logger, accelerator="cpu", **(usual | options)
    )
    trainer.fit(model, datamodule=DigitsDataModule())
    return model


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_page_of_a_run_has_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "FLOAT_LOSS_STEPS", 1)
    reports: list[Report] = []
    monkeypatch.setattr(monitor_module, "report_to", lambda logger, report: reports.append(report))
    monitor = QuantMonitor(images=False, float_loss=True)
    fit(tmp_path, monitor)
    last = reports[-2].scalars
    for name in ("weight_flips", "weight_zeros", "weight_scale_max", "input_scale_min"):
        assert f"quant_layer/mix.0/{name}" in last
    assert {"quant/float/loss", "quant/quantized/loss"} <= set(last)
    report = ReportData.from_json(json.dumps(json.loads(reports[-1].pages["report.json"])))
    assert report.model is not None
    curves = {series.name: series for series in report.model.training}
    assert curves["quant_layer/mix.0/weight_flips"].steps == [4, 8, 12]
    assert curves["quant/quantized/loss"].steps == [4, 8, 12]
    assert curves["val/loss"].values[-1] == pytest.approx(float(report.model.metrics["val/loss"]), rel=1e-3)
    assert report.model.training == monitor.training
    assert report.model.epoch_steps == 4


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_float_losses_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        monitor_module, "losses", lambda trainer, module, batch: calls.append(trainer.global_step) or {}
    )
    monkeypatch.setattr(monitor_module, "FLOAT_LOSS_STEPS", 6)
    fit(tmp_path, QuantMonitor(images=False, float_loss=True, every_n_steps=1), max_epochs=4)
    assert calls == [0, 6, 12]


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(
    ("terminal", "bar", "tables"), [(None, False, 0), (None, True, 2), (True, False, 2), (False, True, 0)]
)
def test_tables_at_start_and_end(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], terminal: bool | None, bar: bool, tables: int
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    fit(
        tmp_path,
        QuantMonitor(images=False, page=False, terminal=terminal),
        "w4a8",
        max_epochs=1,
        enable_progress_bar=bar,
    )
    out = capsys.readouterr().out
    assert out.count("whole model") == tables
    assert out.count("What is quantized") == out.count("The quantized model") == tables / 2
    if tables:
        assert "6 quantized" in out
        assert out.rindex("val/acc") > out.rindex("The quantized model")


def test_only_the_first_rank_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    fit(tmp_path, QuantMonitor(terminal=True, images=False), "w4a8", max_epochs=1)
    assert "whole model" not in capsys.readouterr().out


def test_a_calibration_ends_with_a_table(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    seed_everything(0, verbose=False)
    callbacks: list[Callback] = [PTQ("w4a8", calibration_batches=1), QuantMonitor(terminal=True)]
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(DigitsCNN(width=4), datamodule=DigitsDataModule(), verbose=False)
    out = capsys.readouterr().out
    assert out.count("The quantized model") == 1
    assert "SQNR input" in out


def test_learned_roundings_are_measured_against_the_float_weights(capsys: pytest.CaptureFixture[str]) -> None:
    seed_everything(0, verbose=False)
    model = DigitsCNN(width=4)
    ptq = PTQ("w4a8", calibration_batches=1, phases=["calibrate", {"reconstruct": {"iterations": 2}}])
    callbacks: list[Callback] = [ptq, QuantMonitor(terminal=True)]
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(model, datamodule=DigitsDataModule(), verbose=False)
    out = capsys.readouterr().out
    assert "inf dB" not in out
    layer: Any = model.mix[0]
    was, now = ptq.float_weights["mix.0"].double(), layer.weight_quantizer(layer.weight).detach().double()
    expected = 10 * torch.log10(was.square().sum() / (was - now).square().sum())
    line = next(line for line in out.splitlines() if line.strip().startswith("mix.0"))
    assert f"{float(expected):.1f} dB" in line
