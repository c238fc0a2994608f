"""The main job from end to end, on data that comes with scikit-learn: `python -m lq_plugin.demo`, or `make demo`.

1. trains a small CNN, float;
2. calibrates it to 4 bits with each range estimator, and to 2 bits everywhere (PTQ);
3. searches bits, granularity and clipping of every layer with Optuna;
4. trains on with the best plan that fits the budget (QAT), tracked by W&B, offline;
5. loads the checkpoint into a new model, scores it, and writes it as a packed file.

    pip install "lq_plugin[demo]"
    python -m lq_plugin.demo --output runs/digits_demo --trials 160
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import wandb
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from lq_plugin.callbacks import PTQ, QAT, QuantMonitor
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.export import save_packed
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.model import load_checkpoint
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.report import ReportData, model_report, write_page
from lq_plugin.report.joined import joined
from lq_plugin.report.provenance import provenance
from lq_plugin.search import SearchResult, Space, StudyError, search, study_report

ESTIMATORS = ["minmax", "percentile:99.9", "mse", "kl", "aciq", "aciq_exact", "octav"]
#: The plan that the searched one is compared with: its budget is what this one takes.
UNIFORM = "w2 mse a8 mse"
console = Console()


@dataclass(frozen=True)
class Row:
    """One model of the table at the end: effective bits of its weights, bits of its layers' inputs."""

    name: str
    accuracy: float
    effective_bits: float
    inputs: str
    bytes: int


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    quiet()
    # Images this small are not worth a second thread.
    torch.set_num_threads(1)
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    data = DigitsDataModule()

    console.rule("1. the float model")
    seed_everything(args.seed, verbose=False)
    model = DigitsCNN(width=args.width)
    trainer(args.float_epochs).fit(model, datamodule=data)
    torch.save(model.state_dict(), output / "float.pt")
    rows = [Row("float", test(model, data), 32.0, "32", float_bytes(model))]

    console.rule("2. PTQ: int4 weights, uint4 activations, each range estimator")
    rows.append(best_range(model, data))
    rows.append(scored(f"PTQ, {UNIFORM}", calibrated(model, data, UNIFORM), data))
    budget = rows[-1].effective_bits if args.budget is None else args.budget

    console.rule(f"3. search: {args.trials} trials, at most {budget:.2f} effective bits")
    result = searched_plans(model, data, output, args)
    console.print(result.table())
    best = result.best(budget)
    plan_path = output / "plan.yaml"
    best.plan.to_yaml(plan_path)
    searched = calibrated(model, data, plan_path)
    rows.append(scored("PTQ, searched: no more bits than that", searched, data))

    console.rule("4. QAT of that plan, from the float weights")
    qat, monitor = QAT(QuantPlan.from_yaml(plan_path)), QuantMonitor(float_loss=True)
    tuned = trained(data, [qat, monitor], output, args)
    # A new model, as another program would load it.
    loaded = DigitsCNN(width=args.width)
    load_checkpoint(loaded, output / "quantized.ckpt")
    rows.append(scored("QAT of the searched plan", loaded, data))
    save_packed(loaded, output / "model.safetensors")
    accuracies = {"float": rows[0].accuracy, "PTQ": rows[-2].accuracy, "QAT": rows[-1].accuracy}
    report = training_report(tuned, qat, monitor, data, accuracies, args.seed)
    write_page(joined(report, study_report(result)), output / "report.html")
    show(rows, len(data.splits["test"]), output, time.perf_counter() - start)


def best_range(model: DigitsCNN, data: DigitsDataModule) -> Row:
    """Prints what 4 bits score by each range estimator; returns the row of the best one on the validation split."""
    table = Table("range", "val/acc", "test/acc")
    uniform = []
    for name in ESTIMATORS:
        plan = f"w4 {name} a4 {name}"
        ptq = copy.deepcopy(model)
        (scores,) = trainer(callbacks=[PTQ(plan)], enable_progress_bar=False).validate(
            ptq, datamodule=data, verbose=False
        )
        uniform.append((scores["val/acc"], scored(f"PTQ, {plan}", ptq, data)))
        table.add_row(name, percent(scores["val/acc"]), percent(uniform[-1][1].accuracy))
    console.print(table)
    return max(uniform, key=lambda both: both[0])[1]


def searched_plans(model: DigitsCNN, data: DigitsDataModule, output: Path, args: argparse.Namespace) -> SearchResult:
    """Searches, or goes on with the study in the folder.

    Args:
        model: float.
        data: validation data.
        output: folder of the demo.
        args: of the command.
    """
    weight = {
        "bit_widths": [2, 3, 4, 5, 6, 8],
        "granularities": ["per_channel", "per_tensor"],
        "ranges": ["mse", "minmax", "octav"],
    }
    space = Space(weight=weight, input=["uint4 affine mse", "uint8 affine mse"])
    try:
        return search(
            model, data, space, "val/acc", args.trials, output_dir=output / "search", seed=args.seed, trainer=trainer
        )
    except StudyError:
        # What it was made for stands in the error, value by value; here one sentence will do.
        sys.exit(
            f"{output / 'search'} holds a study of another model or space: remove {output}, or give another --output"
        )


def trained(data: DigitsDataModule, callbacks: list[Callback], output: Path, args: argparse.Namespace) -> DigitsCNN:
    """Trains the float weights with callbacks, and saves the checkpoint.

    Args:
        data: training data.
        callbacks: of the run.
        output: folder of the demo.
        args: of the command.
    """
    seed_everything(args.seed, verbose=False)  # whatever the search drew
    tuned = DigitsCNN(width=args.width, lr=2e-3)
    tuned.load_state_dict(torch.load(output / "float.pt", weights_only=True))
    logger = WandbLogger(project="lq_plugin-demo", name="digits_qat", save_dir=output, offline=True)
    fit = trainer(args.qat_epochs, callbacks=callbacks, logger=logger)
    fit.fit(tuned, datamodule=data)
    fit.save_checkpoint(output / "quantized.ckpt")
    wandb.finish()
    return tuned


def training_report(
    tuned: DigitsCNN,
    qat: QAT,
    monitor: QuantMonitor,
    data: DigitsDataModule,
    accuracies: Mapping[str, float],
    seed: int,
) -> ReportData:
    """Returns the report of the trained module.

    Args:
        tuned: the module.
        qat, monitor: callbacks of its training.
        data: of the demo.
        accuracies: on the test split, by variant.
        seed: of the demo.
    """
    images, batch, board = len(data.splits["test"]), next(iter(data.val_dataloader()))[0], monitor.scoreboard
    for name, accuracy in accuracies.items():
        board.add(name, {"test/acc": accuracy})
    return model_report(
        tuned, qat.plan, ledger=qat.ledger, recording=qat.recording, statistics=qat.statistics,
        training=monitor.training, epoch_steps=len(data.train_dataloader()), run=lambda: tuned(batch),
        scores=board.by_variant, samples=board.samples | {"test/acc": images},
        provenance=provenance(f"digits, {images} test images", seed),
        title="digits: search, then QAT",
    )  # fmt: skip


def trainer(
    max_epochs: int = 1, callbacks: list[Callback] | None = None, logger: WandbLogger | bool = False, **options: Any
) -> Trainer:
    """An ordinary Trainer; a search trial brings its own options.

    Args:
        max_epochs: of the run.
        callbacks: those of the run.
        logger: where metrics go; False: nowhere.
        options: others of the Trainer.
    """
    progress = [RichProgressBar(leave=False)] if options.get("enable_progress_bar", True) else []
    defaults = {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 5}
    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[*(callbacks or []), *progress],
        logger=logger,
        **(defaults | options),
    )


def calibrated(model: DigitsCNN, data: DigitsDataModule, plan: str | Path) -> DigitsCNN:
    """A copy of the float model, calibrated to `plan`.

    Args:
        model: float.
        data: calibration data.
        plan: anything `QuantPlan.parse` reads.
    """
    copied = copy.deepcopy(model)
    trainer(callbacks=[PTQ(plan)], enable_progress_bar=False).validate(copied, datamodule=data, verbose=False)
    return copied


def scored(name: str, model: DigitsCNN, data: DigitsDataModule) -> Row:
    """The row of a quantized model.

    Args:
        name: of the row.
        model: quantized.
        data: validation data.
    """
    price = cost(model)
    widths = {
        layer.input_quantizer.spec.bit_width
        for _, layer in quantized_layers(model)
        if layer.input_quantizer is not None
    }
    return Row(name, test(model, data), price.effective_bits, " and ".join(map(str, sorted(widths))), price.bytes)


def test(model: DigitsCNN, data: DigitsDataModule) -> float:
    """Accuracy on the test split; a quantized model is scored quantized."""
    (result,) = trainer(enable_progress_bar=False).test(model, datamodule=data, verbose=False)
    return result["test/acc"]


def float_bytes(model: torch.nn.Module) -> int:
    return sum(4 * tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())


def show(rows: list[Row], images: int, output: Path, seconds: float) -> None:
    note = f"digits, {images} test images: one of them, {percent(1 / images)}, makes no difference"
    table = Table("model", title=note)
    for column in ("accuracy", "effective bits", "input bits", "bytes", "smaller"):
        table.add_column(column, justify="right")
    for row in rows:
        smaller = f"{rows[0].bytes / row.bytes:.1f} x"
        table.add_row(
            row.name, percent(row.accuracy), f"{row.effective_bits:.2f}", row.inputs, f"{row.bytes:,}", smaller
        )
    console.print(table)
    for what, path in (
        ("report page", "report.html"),
        ("Pareto picture", "search/pareto.png"),
        ("best plans", "search/plans"),
        ("chosen plan", "plan.yaml"),
        ("quantized checkpoint", "quantized.ckpt"),
        ("packed file", "model.safetensors"),
        ("W&B offline run", "wandb/latest-run"),
    ):
        found = output / path
        if not found.exists():
            raise FileNotFoundError(f"{found} was not written")
        size = f" ({found.stat().st_size:,} bytes)" if found.is_file() else ""
        console.print(f"{what:>22}: {found}{size}", highlight=False, soft_wrap=True)
    console.print(f"{'took':>22}: {seconds:.0f} s")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def quiet() -> None:
    """Lightning's notes on hardware and loader workers say nothing new here."""
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    logging.getLogger("wandb").setLevel(logging.ERROR)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m lq_plugin.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/digits_demo"), help="where everything is written")
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument(
        "--budget",
        type=float,
        help="largest effective bits of the chosen plan; those of 2 bits everywhere when not given",
    )
    parser.add_argument("--float-epochs", type=int, default=12)
    parser.add_argument("--qat-epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
