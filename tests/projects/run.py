"""Released projects with a Lightning Trainer, each trained for some steps on made-up data with QAT, then evaluated with
PTQ.

    make test-projects          # makes .venv-projects, runs all, writes tests/projects/results.md

None of them knows this library: their own classes and Trainer options are used, with one callback more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lq_plugin import PTQ, QAT
from lq_plugin.model.prepare import quantizers

RESULTS = Path(__file__).with_name("results.md")
PLAN = "w8a8"
STEPS = 20


@dataclass
class Result:
    """What one project's run gave."""

    task: str
    trainer: Any
    model: torch.nn.Module
    loss: float
    after: str = ""


def trainer_options(folder: Path) -> dict[str, Any]:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return {"max_steps": STEPS, "accelerator": "cpu", "devices": 1, "default_root_dir": str(folder)} | quiet


def neuralforecast(folder: Path) -> Result:
    """`pytorch_lightning`; the library makes its Trainer from keywords of the model."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    days = pd.date_range("2020-01-01", periods=200)
    wave = np.sin(np.arange(200) / 7) + 0.1 * np.random.default_rng(0).standard_normal(200)
    data = pd.concat([pd.DataFrame({"unique_id": f"s{i}", "ds": days, "y": wave + i}) for i in range(4)])
    options = {key: value for key, value in trainer_options(folder).items() if key != "max_steps"}
    model = NHITS(h=7, input_size=28, max_steps=STEPS, mlp_units=3 * [[32, 32]], callbacks=[QAT(PLAN)], **options)
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(data, val_size=14)
    trained = forecast.models[0]
    error = float(np.abs(forecast.predict()["NHITS"].to_numpy()).mean())
    # The library copies what it is given: the callback that ran is the Trainer's.
    return Result(
        "time series, NHITS",
        trained.trainer,
        trained,
        trained.metrics["train_loss"].item(),
        f"forecasts finite: {np.isfinite(error)}",
    )


def pytorch_forecasting(folder: Path) -> Result:
    """`lightning`; the user makes the Trainer."""
    import lightning.pytorch as pl
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    frames = [
        pd.DataFrame({"time": range(100), "series": f"s{i}", "value": np.sin(np.arange(100) / 5 + i)}) for i in range(4)
    ]
    names = {"time_idx": "time", "target": "value", "group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
    data = TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True), max_encoder_length=20, max_prediction_length=5, **names
    )
    loader = data.to_dataloader(train=True, batch_size=16, num_workers=0)
    model = TemporalFusionTransformer.from_dataset(
        data, hidden_size=8, attention_head_size=2, hidden_continuous_size=8, log_interval=-1
    )
    trainer = pl.Trainer(callbacks=[QAT(PLAN)], **trainer_options(folder))
    trainer.fit(model, loader)
    loss = float(trainer.callback_metrics["train_loss_step"])
    evaluated = pl.Trainer(callbacks=[PTQ(PLAN)], **trainer_options(folder)).validate(model, loader, verbose=False)
    return Result(
        "time series, temporal fusion transformer", trainer, model, loss, f"val_loss {evaluated[0]['val_loss']:.3f}"
    )


def chemprop(folder: Path) -> Result:
    """`lightning`; graphs of molecules in batches of its own kind."""
    import lightning.pytorch as pl
    from chemprop import data, models, nn

    smiles = ["C" * (1 + n % 9) + "O" * (n % 3) + "N" * (n % 2) for n in range(64)]
    points = [data.MoleculeDatapoint.from_smi(text, [float(len(text))]) for text in smiles]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=8, num_workers=0)
    model = models.MPNN(
        nn.BondMessagePassing(d_h=32), nn.MeanAggregation(), nn.RegressionFFN(input_dim=32, hidden_dim=32)
    )
    trainer = pl.Trainer(callbacks=[QAT(PLAN)], **trainer_options(folder))
    trainer.fit(model, loader, loader)
    loss = float(trainer.callback_metrics["val_loss"])
    evaluated = pl.Trainer(callbacks=[PTQ(PLAN)], **trainer_options(folder)).validate(model, loader, verbose=False)
    return Result("molecules, message passing", trainer, model, loss, f"val_loss {evaluated[0]['val_loss']:.3f}")


PROJECTS: dict[str, Callable[[Path], Result]] = {
    "neuralforecast": neuralforecast,
    "pytorch-forecasting": pytorch_forecasting,
    "chemprop": chemprop,
}


def row(name: str, folder: Path) -> tuple[bool, str]:
    """One line of the table, and whether the project ran quantized."""
    try:
        result = PROJECTS[name](folder)
    except Exception as error:
        traceback.print_exc()
        return (
            False,
            f"| {name} | {version(name)} | | | | | {type(error).__name__}: {str(error).splitlines()[0][:120]} |",
        )
    ledger = next(callback.ledger for callback in result.trainer.callbacks if isinstance(callback, QAT))
    total, quantized = len(ledger), len(ledger.quantized)
    passed = bool(np.isfinite(result.loss)) and quantized > 0 and all(q.is_calibrated for q in quantizers(result.model))
    outcome = f"{'ok' if passed else 'FAILED'}, {STEPS} steps, loss {result.loss:.3f}, {result.after}"
    shares = " | ".join(
        "" if share is None else f"{share:.1%}" for share in (ledger.weight_coverage, ledger.compute_coverage)
    )
    return passed, f"| {name} | {version(name)} | {result.task} | {quantized} of {total} | {shares} | {outcome} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "projects", nargs="*", metavar="project", help=f"some of {', '.join(PROJECTS)}; all, and the table, by default"
    )
    chosen = parser.parse_args().projects or list(PROJECTS)
    if unknown := [name for name in chosen if name not in PROJECTS]:
        parser.error(f"unknown projects {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rows = []
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, Path(folder)))
    head = f"Plan `{PLAN}`; torch {version('torch')}, lightning {version('lightning')}. Made by `make test-projects`.\n"
    columns = (
        "| project | version | task | layers quantized | weights | compute | result |\n|---|---|---|---|---|---|---|"
    )
    table = "\n".join(["# Released projects, trained quantized\n", head, columns, *(line for _, line in rows)]) + "\n"
    if chosen == list(PROJECTS):
        RESULTS.write_text(table)
    sys.stdout.write(table)
    return 0 if all(passed for passed, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
