"""ResNet-20 on CIFAR-10: calibrated to low bits (PTQ), then trained on for an epoch (QAT).

The data folder holds CIFAR-10 as parquet files in the layout of the Hugging Face `datasets` library, the
weights are a safetensors file (or one of the public .th files). Where to get both is said when they are absent.

    python examples/cifar10_resnet.py --data ../shared/data --plan "w4 mse a4 mse" --qat-epochs 1
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from rich.table import Table

from lq_plugin import PTQ, QAT
from lq_plugin.demo.cifar10 import Cifar10DataModule, DataError
from lq_plugin.demo.resnet import LitClassifier, load_resnet
from lq_plugin.model.measure.cost import cost


def main(arguments: list[str] | None = None) -> list[tuple[str, float, float, int]]:
    args = parse(arguments)
    seed_everything(args.seed, verbose=False)
    data = Cifar10DataModule(args.data, args.batch_size, args.train_size, args.held_out)
    try:
        data.setup("test")
        model = LitClassifier(load_resnet(args.data / args.weights, args.depth), lr=args.lr)
    except DataError as error:
        sys.exit(str(error))
    rows, start = [], time.perf_counter()

    rows.append(("float", test(model, data), 32.0, sum(4 * p.numel() for p in model.parameters())))

    # Corrected batch norms: each channel keeps the mean and variance it had in the float model.
    ptq = PTQ(args.plan, args.calibration_batches, phases=("calibrate", "correct_batch_norm"))
    accuracy = test(model, data, ptq)
    rows.append((f"PTQ {args.plan}", accuracy, cost(model).effective_bits, cost(model).bytes))

    if args.qat_epochs:
        model.train()
        make_trainer(QAT(args.plan), max_epochs=args.qat_epochs).fit(model, datamodule=data)
        accuracy = test(model, data)
        rows.append((f"then QAT, {args.qat_epochs} epochs", accuracy, cost(model).effective_bits, cost(model).bytes))

    show(rows, time.perf_counter() - start)
    return rows


def make_trainer(*callbacks: Callback, max_epochs: int = 1) -> Trainer:
    """An ordinary Trainer, with a progress bar where someone is watching."""
    shown = [RichProgressBar(leave=False)] if sys.stderr.isatty() else []
    return Trainer(
        max_epochs=max_epochs,
        accelerator="auto",
        callbacks=[*callbacks, *shown],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bool(shown),
    )


def test(model: LitClassifier, data: Cifar10DataModule, *callbacks: Callback) -> float:
    """Accuracy on the test images, in percent."""
    (metrics,) = make_trainer(*callbacks).test(model, datamodule=data, verbose=False)
    return 100.0 * metrics["test/acc"]


def show(rows: list[tuple[str, float, float, int]], seconds: float) -> None:
    table = Table("model", title="CIFAR-10 test images", caption=f"{seconds:.0f} s")
    for column in ("accuracy", "effective bits", "bytes", "smaller"):
        table.add_column(column, justify="right")
    for name, accuracy, bits, size in rows:
        table.add_row(name, f"{accuracy:.2f} %", f"{bits:.2f}", f"{size:,}", f"{rows[0][3] / size:.1f} x")
    Console().print(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        metavar="FOLDER",
        help="parquet files (default: %(default)s)",
    )
    weights = "resnet_cifar10/resnet20_jpeg.safetensors"
    parser.add_argument(
        "--weights", default=weights, metavar="FILE", help="a path, or one below --data (default: %(default)s)"
    )
    parser.add_argument("--depth", type=int, default=20, help="20, 32, 44 or 56 (default: %(default)s)")
    parser.add_argument(
        "--plan", default="w4 mse a4 mse", help="what is quantized and how, or a YAML file (default: %(default)s)"
    )
    parser.add_argument("--calibration-batches", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--qat-epochs", type=int, default=1, metavar="N", help="0: PTQ alone (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="highest learning rate of QAT (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--train-size", type=int, metavar="N", help="train images to use (default: all that are not held out)"
    )
    parser.add_argument(
        "--held-out", type=int, default=5_000, metavar="N", help="train images for validation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
