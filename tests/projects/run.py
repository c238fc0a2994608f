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

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass  # outside of the projects' environment this file is read for its doctests alone
except RuntimeError:
    # The package index has it for CUDA: beside a CPU build of torch it cannot load its own operators, which no project
    # here calls. But it wants to know of them, or is not imported, nor is torchmetrics.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import lightning.pytorch as pl

from lq_plugin import PTQ, QAT
from lq_plugin.model.prepare import quantized_layers, quantizers

RESULTS = Path(__file__).with_name("results.md")
PLAN, LEARNED = "w8a8", "w8 lsq a8 lsq"
STEPS = 20


@dataclass
class Result:
    """Result of one project's run."""

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
    """`pytorch_lightning`; the library makes its Trainers from keywords of the model, for forecasts also."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    days = pd.date_range("2020-01-01", periods=200)
    wave = np.sin(np.arange(200) / 7) + 0.1 * np.random.default_rng(0).standard_normal(200)
    data = pd.concat([pd.DataFrame({"unique_id": f"s{i}", "ds": days, "y": wave + i}) for i in range(4)])
    options = {key: value for key, value in trainer_options(folder).items() if key != "max_steps"}

    def trained(*callbacks: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        sizes = {"h": 7, "input_size": 28, "max_steps": STEPS, "mlp_units": 3 * [[32, 32]]}
        forecast = NeuralForecast(models=[NHITS(**sizes, callbacks=list(callbacks), **options)], freq="D")
        forecast.fit(data, val_size=14)
        # The library copies what it is given.
        return forecast, forecast.models[0]

    forecast, model = trained(QAT(PLAN))
    loss = model.metrics["train_loss"].item()
    finite = np.isfinite(forecast.predict()["NHITS"].to_numpy()).all()
    trainer = model.trainer  # of the forecast, with the callback of the fit
    float_forecast, float_model = trained()
    wanted = float_forecast.predict()["NHITS"].to_numpy()
    float_model.trainer_kwargs["callbacks"] = [PTQ(PLAN)]
    found = float_forecast.predict()["NHITS"].to_numpy()
    ranges = [quantizer.is_calibrated for quantizer in quantizers(float_model)]
    if not (ranges and all(ranges)) or np.array_equal(wanted, found):
        raise AssertionError("PTQ: the forecast was not quantized")
    away = np.abs(found - wanted).max() / np.abs(wanted).max()
    return Result(
        "time series, NHITS", trainer, model, loss, f"forecasts finite: {finite}; PTQ: {away:.1%} from those of float"
    )


def pytorch_forecasting(folder: Path) -> Result:
    """`lightning`; the user makes the Trainer."""
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


def anomalib(folder: Path) -> Result:
    """`lightning`; its own Engine around the Trainer, two optimizers by hand, pre- and post-processing inside."""
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Ganomaly
    from PIL import Image

    generator = np.random.default_rng(0)
    for kind, count in (("good", 24), ("bad", 8)):
        (folder / kind).mkdir()
        for number in range(count):
            image = 100 + 10 * generator.standard_normal((64, 64, 3))
            if kind == "bad":
                image[20:36, 20:36] += 120
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{number}.png")
    data = Folder(
        name="squares", root=folder, normal_dir="good", abnormal_dir="bad", train_batch_size=4, eval_batch_size=4,
        num_workers=0,
    )  # fmt: skip
    model = Ganomaly(
        batch_size=4, n_features=16, latent_vec_size=16, pre_processor=Ganomaly.configure_pre_processor((64, 64))
    )
    options = {key: value for key, value in trainer_options(folder).items() if key != "enable_checkpointing"}
    engine = Engine(callbacks=[QAT(PLAN)], **options)
    engine.fit(model, datamodule=data)
    loss = float(engine.trainer.callback_metrics["generator_loss"])
    evaluated = Engine(callbacks=[PTQ(PLAN)], **options).test(model, datamodule=data, verbose=False)
    return Result("images, anomalies by a GAN", engine.trainer, model, loss, f"AUROC {evaluated[0]['image_AUROC']:.3f}")


class Rates(pl.Callback):
    """Each learned range has the rate of its weight, in every epoch."""

    def __init__(self) -> None:
        self.seen: set[float] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
        for name, layer in quantized_layers(pl_module):
            rate = rates[id(layer.weight)]
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if any(rates[id(p)] != rate for p in quantizer.parameters()):
                    raise AssertionError(f"{name}: its learned range has another rate than its weight")
            self.seen.add(rate)


def timm(folder: Path) -> Result:
    """No Lightning of its own: its model, its groups by layer, and each of its schedulers in a Trainer, with LSQ."""
    from timm import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    class Classifier(pl.LightningModule):
        def __init__(self, schedule: str) -> None:
            super().__init__()
            self.schedule, self.net = schedule, create_model("test_resnet", num_classes=4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = create_optimizer_v2(self.net, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
            times = {"num_epochs": 4, "warmup_epochs": 1, "decay_epochs": 1, "decay_milestones": [2, 3]}
            made, _ = create_scheduler_v2(optimizer, self.schedule, **times)
            return [optimizer], [made]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(self.current_epoch + 1, 1.0)

    images = torch.randn(16, 3, 64, 64)
    loader = torch.utils.data.DataLoader(list(zip(images, torch.arange(16) % 4, strict=True)), batch_size=4)
    options = trainer_options(folder) | {"max_steps": -1, "max_epochs": 5}
    for schedule in ("cosine", "tanh", "step", "multistep", "plateau", "poly"):
        torch.manual_seed(0)
        model, rates = Classifier(schedule), Rates()
        trainer = pl.Trainer(callbacks=[QAT(LEARNED), rates], **options)
        trainer.fit(model, loader)
        if len(rates.seen) < 4:
            raise AssertionError(f"{schedule}: the rates do not change")
    evaluated = pl.Trainer(callbacks=[PTQ(PLAN, dataloader=loader)], **options).validate(
        Classifier("step"), loader, verbose=False
    )
    loss = float(trainer.callback_metrics["loss"])
    after = f"6 schedulers, PTQ val_loss {evaluated[0]['val_loss']:.3f}"
    return Result("images, ResNet with LSQ, groups by layer", trainer, model, loss, after)


PROJECTS: dict[str, Callable[[Path], Result]] = {
    "neuralforecast": neuralforecast,
    "pytorch-forecasting": pytorch_forecasting,
    "chemprop": chemprop,
    "anomalib": anomalib,
    "timm": timm,
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
    versions = f"torch {version('torch')}, lightning {version('lightning')}"
    head = f"Plan `{PLAN}`, timm with `{LEARNED}`; {versions}. Made by `make test-projects`.\n"
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
