"""QAT in a project you have: three lines, and the module stays as it is.

1. `callbacks=[QAT(plan)]` quantizes the module at the start of `trainer.fit` and trains on with 4-bit weights.
2. `QuantMonitor()` sends bits, ranges, SQNR and the report page to the loggers that the Trainer has, and prints what is
   quantized. The page draws its own pictures, so this script asks for no others (`images=False`).
3. The checkpoint is an ordinary one; `load_checkpoint` loads it into a new module without Lightning.

    python examples/qat_existing_project.py --output runs/qat
    lq-report runs/qat
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lq_plugin import QAT, QuantMonitor, load_checkpoint
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule, trained_cnn


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    data = DigitsDataModule()
    model = trained_cnn(args.float_epochs)  # your module, with your weights
    (before,) = Trainer(accelerator="cpu", logger=False).test(model, datamodule=data, verbose=False)

    qat = QAT(
        "w4 mse a8",  # int4 weights per channel, clipped for the smallest error; uint8 inputs
        schedule={"activations_start": "epoch 1", "batch_norm_freeze": "epoch 2"},
        min_coverage=0.9,  # fail at once when less than 90 % of the weights or of the MACs would be quantized
    )
    logger = CSVLogger(args.output, name="", version="")
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[qat, QuantMonitor(images=False)],
        logger=logger,
        enable_checkpointing=False,
        log_every_n_steps=5,
    )
    trainer.fit(model, datamodule=data)
    (after,) = trainer.test(model, datamodule=data, verbose=False)
    trainer.save_checkpoint(args.output / "quantized.ckpt")

    # Elsewhere, later: a new float module takes the quantized checkpoint, bit for bit.
    served = DigitsCNN()
    load_checkpoint(served, args.output / "quantized.ckpt")
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(served.eval()(images), model.eval()(images))

    print(qat.ledger.summary())
    print(
        f"test/acc {before['test/acc']:.4f} float, {after['test/acc']:.4f} quantized; page: "
        f"{args.output / 'quant' / 'report.html'}"
    )
    return {"float": before["test/acc"], "quantized": after["test/acc"]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/qat"))
    parser.add_argument("--float-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
