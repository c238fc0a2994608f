"""Low-bit training: ResNet-20 fine-tuned on CIFAR-10 with binary, ternary, codebook and other formats.

    python -m benchmarks.low_bit --json out.json --epochs 3

The first convolution and the last linear layer stay float, as in the papers; every format starts from the same float
weights and gets the same budget, and so does the float model. Every run is an ordinary Trainer with the callback
QAT and the recipe of conf/experiment/cifar10_low_bit.yaml and conf/shared/quantization/cifar10_*.yaml.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import warnings
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
import yaml
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from benchmarks import common
from lq_plugin import QAT, QuantPlan
from lq_plugin.demo.cifar10 import Cifar10DataModule, load_images
from lq_plugin.demo.resnet import LitClassifier, load_resnet
from lq_plugin.model.measure.cost import cost

#: Train images that --tune keeps for scoring.
HELD_OUT = 5_000


#: Formats, by the names of conf/shared/quantization/cifar10_*.yaml.
FORMATS = ("sign", "bwn", "twn", "ttq", "kmeans2", "mx4", "vsq4", "lsq2", "seq", "seq_ternary")
CONF, SHARED = files("lq_plugin.conf"), files("lq_plugin.conf.shared")


@dataclass(frozen=True)
class Recipe:
    """Training of a format: its plan (None: float), the highest learning rate, the share of distillation."""

    plan: QuantPlan | None
    lr: float
    distill: float | None = None
    weight_decay: float = 1e-4


def recipe_of(name: str) -> Recipe:
    """The recipe of `conf/`; the float model has no teacher."""
    experiment = yaml.safe_load((CONF / "experiment/cifar10_low_bit.yaml").read_text())
    lr = experiment["model"]["lr"]
    if name == "float":
        return Recipe(None, lr)
    rules = yaml.safe_load((SHARED / f"quantization/cifar10_{name}.yaml").read_text())["rules"]
    return Recipe(QuantPlan.from_dict({"rules": rules}), lr, experiment["callbacks"]["lq_qat"]["distill"])


def with_weight(plan: QuantPlan, spec: str) -> QuantPlan:
    """Returns the plan with another spec for all layers that are not float."""
    return QuantPlan([replace(plan.rules[0], weight=spec), *plan.rules[1:]])


def train(
    name: str, recipe: Recipe, model: LitClassifier, data: Cifar10DataModule, options: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune a copy of `model` and score it."""
    seed_everything(options.seed, verbose=False)
    tuned = copy.deepcopy(model)
    tuned.to(memory_format=torch.channels_last)  # a quarter faster
    tuned.lr, tuned.weight_decay = recipe.lr, recipe.weight_decay
    qat = [] if recipe.plan is None else [QAT(recipe.plan, distill=recipe.distill)]
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        callbacks=[*qat, RichProgressBar(leave=False)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with common.Stopwatch() as watch:
        trainer.fit(tuned, datamodule=data)
    split = "val" if options.tune else "test"
    score = trainer.validate if options.tune else trainer.test
    trainer.limit_val_batches = 1.0
    (metrics,) = score(tuned, datamodule=data, verbose=False)
    return {
        "format": name,
        "accuracy": round(100.0 * metrics[f"{split}/acc"], 3),
        "effective_bits": round(cost(tuned).quantized_effective_bits, 4),
        "epochs": options.epochs,
        "seconds": round(watch.seconds, 1),
        "spec": None if recipe.plan is None else str(recipe.plan.rules[0].weight),
        "lr": recipe.lr,
        "distill": recipe.distill,
        "split": split,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--formats", nargs="+", choices=["float", *FORMATS], default=["float", *FORMATS], help="default: all"
    )
    parser.add_argument(
        "--weights", default="resnet_cifar10/resnet20_jpeg.safetensors", metavar="FILE", help="below --data, or a path"
    )
    parser.add_argument(
        "--depth", type=int, default=20, help="layers of the ResNet that the weights are for (default: %(default)s)"
    )
    parser.add_argument(
        "--train-size", type=int, metavar="N", help="train images to use (default: all that are not held out)"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="score on the last 5,000 train images, held out of training, not on the test set",
    )
    parser.add_argument("--lr", type=float, help="instead of the recipes'")
    parser.add_argument("--distill", type=float, help="instead of the recipes'")
    parser.add_argument("--weight", nargs="+", metavar="SPEC", help="specs, each of them instead of the recipes'")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    quiet()
    model = LitClassifier(load_resnet(options.data / options.weights, options.depth))
    data = Cifar10DataModule(options.data, train_size=options.train_size, held_out=HELD_OUT if options.tune else 0)
    if not options.tune:
        load_images(options.data, "test", 0, 1)  # a missing file is said before hours of work
    results: dict[str, Any] = {"float": None, "results": []}
    runs = [
        (name, weight) for name in options.formats for weight in (options.weight if name != "float" else None) or [None]
    ]
    for name, weight in runs:
        recipe = recipe_of(name)
        if recipe.plan is not None:
            changes = {key: value for key in ("lr", "distill") if (value := getattr(options, key)) is not None}
            plan = recipe.plan if weight is None else with_weight(recipe.plan, weight)
            recipe = replace(recipe, plan=plan, **changes)
        row = train(name, recipe, model, data, options)
        if name == "float":
            results["float"] = row["accuracy"]
        results["results"].append(row)
        common.write_json(options.json, results)
        Console().print(f"{weight or name}: {row['accuracy']:.2f} %, {row['seconds']:.0f} s", highlight=False)
    Console().print(table(results))
    return results


def table(results: dict[str, Any]) -> Table:
    """One row a format, with its distance to float."""
    result = Table(title=f"ResNet on CIFAR-10, {results['results'][0]['epochs']} epochs")
    for column in ("format", "accuracy", "below float", "bits a weight", "seconds"):
        result.add_column(column, justify="left" if column == "format" else "right")
    for row in results["results"]:
        below = "-" if results["float"] is None else f"{results['float'] - row['accuracy']:.2f}"
        result.add_row(
            row["spec"] or row["format"],
            f"{row['accuracy']:.2f}",
            below,
            f"{row['effective_bits']:.2f}",
            f"{row['seconds']:.0f}",
        )
    seconds = statistics.mean(row["seconds"] for row in results["results"])
    result.caption = f"{seconds:.0f} s a format on average"
    return result


def quiet() -> None:
    """Lightning's notes on hardware and loader workers say nothing new here."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    torch.set_float32_matmul_precision("high")


if __name__ == "__main__":
    main()
