"""PTQ below 4 bits: the same calibration images, rounded to nearest, by AdaRound and by BRECQ.

`PTQ` quantizes when `trainer.validate`, `test` or `predict` start; no label is used and nothing is trained. Its phases
run in the order you write:

* `fold_batch_norm` puts batch norms into the layers in front of them, where a recorded batch proves that safe;
* `calibrate` finds the ranges;
* `reconstruct` learns which weights to round up, layer by layer (AdaRound) or block by block (BRECQ).

    python examples/ptq_learned_rounding.py
"""

from __future__ import annotations

import argparse
import copy

from lightning import Trainer

from lq_plugin import PTQ
from lq_plugin.demo.digits import DigitsDataModule, trained_cnn

PLAN = "int2 per_channel affine mse / uint8 affine mse"


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    data, model = DigitsDataModule(), trained_cnn(args.float_epochs)
    learned = {"iterations": args.iterations, "seed": 0}
    methods = {
        "nearest": ["fold_batch_norm", "calibrate"],
        "AdaRound": ["calibrate", {"reconstruct": {"by": "layer", **learned}}],
        "BRECQ": ["calibrate", {"reconstruct": {"by": "block", **learned}}],
    }
    scores = {"float": evaluate(model, data)}
    for name, phases in methods.items():
        scores[name] = evaluate(copy.deepcopy(model), data, PTQ(PLAN, calibration_batches=8, phases=phases))
    for name, score in scores.items():
        print(f"{name:>9}  test/acc {score:.4f}")
    return scores


def evaluate(model, data: DigitsDataModule, *callbacks: PTQ) -> float:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    return result["test/acc"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--float-epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=300)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
