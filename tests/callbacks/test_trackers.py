"""MLflow's artifacts and TensorBoard's HParams, read back by MLflow's client and TensorBoard's own plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lq_plugin import PTQ, QAT, QuantMonitor, QuantPlan
from lq_plugin.callbacks.monitor.loggers import add_hparams
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.report import ReportData

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def hparams(folder: Path) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """Returns the parameters of a row of HParams, its scalars, and the metrics that the table has a column for."""
    events = EventAccumulator(str(folder))
    events.Reload()
    content = events.summary_metadata
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG].plugin_data.content)
    params = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    scalars = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    return params, scalars, [info.name.tag for info in experiment.metric_infos]


# MLflow's own use of SQLAlchemy 2.1.
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::sqlalchemy.exc.SADeprecationWarning"
)
def test_mlflow_has_plan_tables_pictures_and_page(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow or mlflow-skinny")
    logger = MLFlowLogger(
        "quantization",
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
        artifact_location=(tmp_path / "files").as_uri(),
    )
    torch.manual_seed(0)
    trainer = Trainer(callbacks=[PTQ("w4 mse a8"), QuantMonitor(max_layers=1)], logger=logger, **QUIET)
    (scores,) = trainer.validate(DigitsCNN(width=4), datamodule=DigitsDataModule(), verbose=False)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(logger.run_id)
    assert run.data.metrics["val/acc"] == pytest.approx(scores["val/acc"])
    assert 4 < run.data.metrics["quant/effective_bits"] < 32
    assert "quant_layer/stem.0/weight_sqnr_db" in run.data.metrics
    names = {Path(file.path).name for file in client.list_artifacts(logger.run_id, "quant")}
    assert names >= {"plan.yaml", "cost.csv", "ledger.csv", "fidelity.csv", "report.json", "report.html", "step_000000"}
    folder = Path(client.download_artifacts(logger.run_id, "quant", str(tmp_path)))
    assert QuantPlan.from_yaml(folder / "plan.yaml") == QuantPlan.parse("w4 mse a8")
    report = ReportData.load(folder / "report.json")
    assert report.model is not None
    assert {s.variant for s in report.model.scores} == {"PTQ"}
    assert (folder / "step_000000" / "bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_run_is_a_row_of_hparams(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="only")
    monitor = QuantMonitor(images=False, page=False)
    trainer = Trainer(max_epochs=1, limit_train_batches=2, callbacks=[QAT("w2 a8"), monitor], logger=logger, **QUIET)
    trainer.fit(DigitsCNN(width=4), datamodule=DigitsDataModule())
    params, scalars, columns = hparams(tmp_path / "run" / "only" / "quant")
    assert params["bits.*"] == 2
    assert params["input_bits.*"] == 8
    assert scalars["val/acc"] == pytest.approx(float(trainer.callback_metrics["val/acc"]), abs=1e-6)
    assert {"val/acc", "quant/effective_bits", "quant/bytes"} <= set(columns)


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="only")
    add_hparams(logger, "trial_0001", {"bits.a": 4, "range.a": "mse"}, {"acc": 0.5, "loss": float("nan")})
    params, scalars, columns = hparams(tmp_path / "run" / "only" / "trial_0001")
    assert params == {"bits.a": 4.0, "range.a": "mse"}
    assert scalars == {"acc": 0.5}
    assert columns == ["acc"]
