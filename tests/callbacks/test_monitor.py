"""QuantMonitor: what reaches each logger is read back from its files."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lq_plugin import PTQ, QAT, QuantMonitor, QuantPlan
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.fidelity import layer_fidelity
from lq_plugin.model.prepare import quantizers

LAYERS = ["stem.0", "down.0", "block.conv1", "block.conv2", "mix.0", "head.2"]
TOTALS = [
    *(
        "effective_bits",
        "quantizable_effective_bits",
        "quantized_effective_bits",
        "bytes",
        "float_bytes",
        "compression",
        "macs",
        "bops",
    ),
    *("weight_coverage", "compute_coverage", "active"),
]
PLAN = "w4 mse a8"


class Recorder(Logger):
    """A logger that this library knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = "recorder"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        quant = {key: value for key, value in metrics.items() if key.startswith(("quant/", "quant_layer/"))}
        if quant:
            self.rows.append((step, quant))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def steps(self) -> list[int | None]:
        return [step for step, _ in self.rows]


def make_trainer(loggers: Any, callbacks: list[Any], **options: Any) -> Trainer:
    defaults = {
        "max_epochs": 2,
        "limit_train_batches": 3,
        "limit_val_batches": 2,
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(logger=loggers, callbacks=callbacks, **(defaults | options))


def train(loggers: Any, callbacks: list[Any], **options: Any) -> tuple[Trainer, DigitsCNN]:
    seed_everything(0, verbose=False)
    model = DigitsCNN(width=4)
    trainer = make_trainer(loggers, callbacks, **options)
    trainer.fit(model, datamodule=DigitsDataModule())
    return trainer, model


class Run:
    """One fit with all three loggers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        loggers = [
            WandbLogger(name="fit", offline=True, save_dir=folder),
            CSVLogger(folder, name="csv"),
            TensorBoardLogger(folder, name="tensorboard"),
        ]
        try:
            # The monitor stands first: it must not depend on the order.
            self.trainer, self.model = train(loggers, [QuantMonitor(max_layers=2), QAT(PLAN)])
        finally:
            wandb.finish()

    def wandb_records(self) -> list[dict[str, Any]]:
        (log,) = self.folder.glob("wandb/offline-run-*/run-*.wandb")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def wandb_files(self) -> Path:
        (files,) = self.folder.glob("wandb/offline-run-*/files")
        return files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    server = socket.create_server(("127.0.0.1", 0))
    calls = []

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            calls.append(1)
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / "wandb-home"))
        made = Run(folder)
        made.calls = calls  # type: ignore[attr-defined]
        yield made
    server.close()


def scalars_of_end(run: Run) -> dict[str, float]:
    """Returns the last scalars as they must be, computed from the trained model."""
    qat = next(c for c in run.trainer.callbacks if isinstance(c, QAT))
    priced = cost(run.model, qat.recording)
    expected = {f"quant/{key}": float(value) for key, value in priced.totals().items() if value is not None}
    expected |= {
        "quant/weight_coverage": 1.0,
        "quant/compute_coverage": qat.ledger.compute_coverage,
        "quant/active": 1.0,
    }
    for row in priced:
        expected |= {f"quant_layer/{row.name}/weight_bits": 4.0, f"quant_layer/{row.name}/input_bits": 8.0}
        expected[f"quant_layer/{row.name}/effective_bits"] = row.effective_bits
    for row in layer_fidelity(run.model):
        if row.slot == "weight":
            expected[f"quant_layer/{row.layer}/weight_sqnr_db"] = row.sqnr_db
            expected[f"quant_layer/{row.layer}/weight_clipping_share"] = row.clipping_share
        expected[f"quant_layer/{row.layer}/{row.slot}_min"] = row.minimum
        expected[f"quant_layer/{row.layer}/{row.slot}_max"] = row.maximum
    return expected


KEYS = {f"quant/{name}" for name in TOTALS} | {
    f"quant_layer/{layer}/{name}"
    for layer in LAYERS
    for name in (
        *("weight_bits", "effective_bits", "input_bits"),
        *(f"{slot}_{name}" for slot in ("weight", "input") for name in ("sqnr_db", "clipping_share", "min", "max")),
    )
}


def test_wandb_has_numbers_tables_pictures_plan_and_artifact(run: Run) -> None:
    records = run.wandb_records()
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    scalars = [row for row in rows if "quant/weight_coverage" in row]
    assert [row["trainer/global_step"] for row in scalars] == [0, 3, 6]
    for row in scalars:
        assert set(row) >= KEYS
    assert {key: scalars[-1][key] for key in scalars_of_end(run)} == pytest.approx(scalars_of_end(run), rel=1e-5)
    # Lightning's own numbers are there beside them.
    assert any("val/acc" in row for row in rows)

    shown = [row for row in rows if "quant/ledger._type" in row]
    assert [row["trainer/global_step"] for row in shown] == [0, 6]
    for name in ("ledger", "cost", "fidelity", "ranges"):
        assert shown[0][f"quant/{name}._type"] == "table-file"
    captions = [
        {key.removeprefix("quant/").removesuffix("._type") for key, value in row.items() if value == "image-file"}
        for row in shown
    ]
    weights = {f"weights/{layer}.weight" for layer in ("block.conv1", "block.conv2")}
    activations = {f"activations/{layer}.input" for layer in ("block.conv1", "block.conv2")}
    assert captions == [{"bits", "sqnr"} | weights | activations, {"bits", "sqnr"} | weights]
    for key, value in shown[0].items():
        if key.endswith(".path"):
            assert (run.wandb_files() / value).stat().st_size > 0, key

    config: dict[str, Any] = {}
    for record in records:
        if record["type"] == "config":
            config |= record["config"].get("update", {})
    assert QuantPlan.from_dict(config["quantization"]) == QuantPlan.parse(PLAN)
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    (kept,) = [artifact for artifact in artifacts if artifact["type"] == "quantization"]
    assert kept["name"].startswith("quantization-")


def test_wandb_media_lie_under_the_run(run: Run) -> None:
    media = run.wandb_files() / "media"
    pictures = list(media.rglob("*.png"))
    assert len(pictures) == 6 + 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in sorted(media.rglob("*.table.json"))}
    assert set(tables) == {"ledger", "cost", "fidelity", "ranges"}
    ledger = tables["ledger"]
    names = [row[ledger["columns"].index("name")] for row in ledger["data"]]
    assert [name for name in names if name in LAYERS] == LAYERS
    assert "block.add_0" in names
    ranges = tables["ranges"]
    assert {row[ranges["columns"].index("range")] for row in ranges["data"]} >= {"minmax", "mse", "kl", "octav"}
    assert {row[ranges["columns"].index("name")] for row in ranges["data"]} == {f"{layer}.input" for layer in LAYERS}


def test_wandb_offline_never_calls_out(run: Run) -> None:
    assert run.calls == []  # type: ignore[attr-defined]


def test_csv_has_numbers_and_files(run: Run) -> None:
    folder = run.folder / "csv" / "version_0"
    with open(folder / "metrics.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["quant/weight_coverage"]]
    assert [int(row["step"]) for row in rows] == [0, 3, 6]
    assert all(row[key] for row in rows for key in KEYS)
    got = {key: float(rows[-1][key]) for key in scalars_of_end(run)}
    assert got == pytest.approx(scalars_of_end(run), rel=1e-5)
    quant = folder / "quant"
    assert QuantPlan.from_yaml(quant / "plan.yaml") == QuantPlan.parse(PLAN)
    with open(quant / "ledger.csv", newline="") as stream:
        assert [row["name"] for row in csv.DictReader(stream) if row["weight"] != "float"] == LAYERS
    for name in ("cost", "fidelity", "ranges"):
        assert (quant / f"{name}.csv").read_text().count("\n") > len(LAYERS)
    pictures = {str(path.relative_to(quant)) for path in quant.rglob("*.png")}
    assert "step_000000/activations/block.conv1.input.png" in pictures
    assert "step_000006/weights/block.conv2.weight.png" in pictures
    assert {"step_000000/bits.png", "step_000006/sqnr.png"} <= pictures


def test_tensorboard_has_numbers_and_pictures(run: Run) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard" / "version_0"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= KEYS
    assert [event.step for event in events.Scalars("quant/effective_bits")] == [0, 3, 6]
    expected = scalars_of_end(run)
    got = {key: events.Scalars(key)[-1].value for key in expected}
    assert got == pytest.approx(expected, rel=1e-5)
    assert {"quant/bits", "quant/weights/block.conv1.weight", "quant/activations/block.conv1.input"} <= set(
        tags["images"]
    )
    picture = events.Images("quant/bits")[0]
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    plan, ledger = (
        events.Tensors(f"quant/{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("plan", "ledger")
    )
    assert yaml.safe_load(textwrap.dedent(plan)) == QuantPlan.parse(PLAN).to_dict()
    assert "| block.conv1 | Conv2d | int4 per_channel mse | uint8 affine ema | float |" in ledger


def test_any_other_logger_gets_the_numbers() -> None:
    recorder = Recorder()
    train(recorder, [QAT(PLAN), QuantMonitor(images=False)])
    assert recorder.steps == [0, 3, 6]
    for _, metrics in recorder.rows:
        assert set(metrics) == KEYS
        assert all(type(value) is float and isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_epochs": 2}, [0, 6, 12]),
        ({"every_n_epochs": None}, [0, 12]),
        ({"every_n_epochs": None, "every_n_steps": 5}, [0, 5, 10, 12]),
        ({"every_n_epochs": 4, "every_n_steps": 6}, [0, 6, 12]),
    ],
)
def test_numbers_come_as_often_as_asked(options: dict[str, Any], steps: list[int]) -> None:
    recorder = Recorder()
    train(recorder, [QAT(PLAN), QuantMonitor(images=False, **options)], max_epochs=4)
    assert recorder.steps == steps


def test_gradient_accumulation_logs_a_step_once() -> None:
    recorder = Recorder()
    monitor = QuantMonitor(every_n_epochs=None, every_n_steps=1, images=False)
    train(recorder, [QAT(PLAN), monitor], max_epochs=1, limit_train_batches=6, accumulate_grad_batches=3)
    assert recorder.steps == [0, 1, 2]


def test_training_is_not_disturbed() -> None:
    def state(callbacks: list[Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor, list[bool]]:
        trainer, model = train(Recorder(), callbacks)
        flags = [module.training for module in model.modules()]
        return dict(trainer.callback_metrics), model.state_dict(), torch.get_rng_state(), flags

    plain = state([QAT(PLAN)])
    watched = state([QAT(PLAN), QuantMonitor(every_n_steps=1, max_layers=1)])
    assert plain[0].keys() == watched[0].keys()
    assert all(torch.equal(plain[0][key], watched[0][key]) for key in plain[0])
    assert plain[1].keys() == watched[1].keys()
    assert all(torch.equal(plain[1][key], watched[1][key]) for key in plain[1])
    assert torch.equal(plain[2], watched[2])
    assert plain[3] == watched[3]


def test_hooks_are_gone_after_a_failure() -> None:
    class Failing(DigitsCNN):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx < 2:
                return loss
            # The last batch is the one that is watched.
            seen.append(sum(len(quantizer._forward_pre_hooks) for quantizer in quantizers(self)))
            raise RuntimeError("out of luck")

    seen: list[int] = []
    model = Failing(width=4)
    trainer = make_trainer(Recorder(), [QAT(PLAN), QuantMonitor(images=False)])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(model, datamodule=DigitsDataModule())
    assert seen == [len(LAYERS)]
    assert not any(quantizer._forward_pre_hooks for quantizer in quantizers(model))


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_evaluation_is_logged_once(loop: str) -> None:
    seed_everything(0, verbose=False)
    recorder, model, data = Recorder(), DigitsCNN(width=4), DigitsDataModule()
    options: dict[str, Any] = {"limit_test_batches": 2, "limit_predict_batches": 2}
    data.setup()
    ptq = PTQ("w3 a4", calibration_batches=2, dataloader=data.train_dataloader())
    trainer = make_trainer(recorder, [QuantMonitor(images=False), ptq], **options)
    loader = data.val_dataloader()
    if loop == "predict":
        trainer.predict(model, loader)
    else:
        getattr(trainer, loop)(model, loader, verbose=False)
    assert recorder.steps == [0]
    metrics = recorder.rows[0][1]
    assert set(metrics) == KEYS
    assert metrics["quant_layer/stem.0/weight_bits"] == 3
    if loop == "validate":
        # Activations were measured on the first batch of the loop.
        batch = next(iter(data.val_dataloader()))
        rows = {row.layer: row for row in layer_fidelity(model, lambda: model(batch[0])) if row.slot == "input"}
        assert metrics["quant_layer/mix.0/input_sqnr_db"] == pytest.approx(rows["mix.0"].sqnr_db, abs=1e-4)
        assert metrics["quant_layer/mix.0/input_clipping_share"] == pytest.approx(
            rows["mix.0"].clipping_share, abs=1e-6
        )


def test_a_delayed_start_shows() -> None:
    recorder = Recorder()
    schedule = {"weights_start": "epoch 1", "activations_start": "epoch 1"}
    train(recorder, [QAT(PLAN, schedule=schedule), QuantMonitor(images=False)])
    assert [metrics["quant/active"] for _, metrics in recorder.rows] == [0.0, 0.0, 1.0]


def test_without_ranges_there_are_fewer_numbers_and_no_error() -> None:
    recorder = Recorder()
    train(recorder, [QAT("w4 a8", init_batches=0), QuantMonitor(max_layers=1)], num_sanity_val_steps=0)
    first, last = recorder.rows[0][1], recorder.rows[-1][1]
    assert "quant_layer/stem.0/input_sqnr_db" not in first
    assert "quant_layer/stem.0/weight_sqnr_db" in first
    assert "quant_layer/stem.0/input_sqnr_db" in last


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_measured_too() -> None:
    def numbers(compiled: bool) -> list[float]:
        seed_everything(0, verbose=False)
        model, recorder = DigitsCNN(width=4), Recorder()
        if compiled:
            model.compile(backend="eager")
        make_trainer(recorder, [QAT(PLAN), QuantMonitor(images=False)], num_sanity_val_steps=0).fit(
            model, datamodule=DigitsDataModule()
        )
        return [metrics["quant_layer/mix.0/input_sqnr_db"] for _, metrics in recorder.rows]

    assert numbers(True) == pytest.approx(numbers(False), abs=1e-3)


def test_other_ranks_log_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    recorder = Recorder()
    train(recorder, [QAT(PLAN), QuantMonitor()])
    assert recorder.rows == []


def test_no_logger_is_a_warning_and_no_quantization_an_error() -> None:
    with pytest.warns(UserWarning, match="no logger"):
        train(False, [QAT(PLAN), QuantMonitor()])
    with pytest.raises(QuantizationError, match=r"neither: Trainer\(callbacks=\[QAT"):
        train(Recorder(), [QuantMonitor()])


@pytest.mark.parametrize(
    "options", [{"every_n_epochs": 0}, {"every_n_steps": -1}, {"every_n_steps": True}, {"max_layers": -1}]
)
def test_impossible_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match=next(iter(options))):
        QuantMonitor(**options)


def test_a_csv_log_is_not_cleared_by_its_own_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    train(logger, [QAT(PLAN), QuantMonitor(max_layers=0)], max_epochs=1)
    assert os.path.exists(Path(logger.log_dir, "metrics.csv"))
    assert not list(Path(logger.log_dir).rglob("weights/*.png"))
    assert list(Path(logger.log_dir).rglob("bits.png"))
