"""Training at one and two bits: a schedule that lowers the precision, and the float model as teacher.

A rule with a `start` takes over at that moment. Here the weights are int8 at first, so that the network gets used to
quantized inputs, then ternary with learned scales (TTQ), or binary (`--format bwn`). First and last layer stay at
8 bits, because the plan says so. `distill=0.5` makes half of the loss: answer as the float copy does.

    python examples/low_bit_training.py --format ttq --output runs/low_bit
    lq-report runs/low_bit        # flips, zeros and scales over the run
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lq_plugin import QAT, QuantMonitor
from lq_plugin.demo.digits import DigitsDataModule, trained_cnn
from lq_plugin.model.measure.cost import cost


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    data, model = DigitsDataModule(), trained_cnn(args.float_epochs)
    plan = {
        "rules": [
            {"match": "*", "weight": "int8 per_channel", "input": "uint8 affine ema"},
            {"match": "re:(down|block|mix).*", "weight": args.format, "start": "epoch 1"},
        ],
        "schedule": {"observer_freeze": f"epoch {args.epochs - 1}"},
    }
    monitor = QuantMonitor(images=False, float_loss=True)
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[QAT(plan, distill=0.5), monitor],
        logger=CSVLogger(args.output, name="", version=""),
        enable_checkpointing=False,
        log_every_n_steps=5,
    )
    trainer.fit(model, datamodule=data)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)

    curves = {series.name: series.values for series in monitor.training}
    print("share of zeros in block.conv1 :", curves["quant_layer/block.conv1/weight_zeros"])
    print("flips an epoch in block.conv1 :", curves.get("quant_layer/block.conv1/weight_flips", []))
    print(
        f"{args.format}: {cost(model).quantizable_effective_bits:.2f} bits a weight, test/acc {scores['test/acc']:.4f}"
    )
    return {"bits": cost(model).quantizable_effective_bits, "test/acc": scores["test/acc"]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="ttq", help="bwn, sign, twn, ttq, ... (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/low_bit"))
    parser.add_argument("--float-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
