"""A sweep on one machine: bits, granularity and clipping of every layer, chosen by Optuna.

The model is loaded and calibrated once; a trial exchanges quantizers, so it costs little more than its validation. Run
again, the study goes on where it stopped. The same from the command line, with two workers on one study:

    python examples/sweep_one_machine.py --output runs/sweep --trials 60
    lq-search -m worker=0,1 hydra/launcher=joblib experiment=digits_search
    lq-report runs/sweep
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from lightning import Trainer

from lq_plugin import PTQ
from lq_plugin.demo.digits import DigitsDataModule, trained_cnn
from lq_plugin.search import SearchResult, Space, search


def main(arguments: list[str] | None = None) -> SearchResult:
    args = parse(arguments)
    data, model = DigitsDataModule(), trained_cnn(args.float_epochs)
    space = Space(
        weight={"bit_widths": [2, 3, 4, 6, 8], "granularities": ["per_channel", "per_tensor"], "ranges": ["mse"]},
        input=["uint4 affine mse", "uint8 affine mse"],
    )
    result = search(
        model,
        data,
        space,
        metric="val/acc",
        n_trials=args.trials,
        cost="effective_bits",
        constraints=["effective_bits <= 6"],  # what costs too much is never evaluated
        output_dir=args.output,
        trainer=partial(Trainer, accelerator="cpu"),
    )
    print(
        f"{len(result.candidates)} trials, {len(result.front)} plans that no other beats; picture: "
        f"{args.output / 'pareto.png'}"
    )

    best = result.best(args.budget)  # the best metric with at most so many bits
    best.plan.to_yaml(args.output / "chosen.yaml")
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[PTQ(args.output / "chosen.yaml")])
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    print(
        f"trial {best.number}: {best.effective_bits:.2f} bits, val/acc {best.metric:.4f}, test/acc "
        f"{scores['test/acc']:.4f}"
    )
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--budget", type=float, default=4.0, help="largest effective bits of the chosen plan")
    parser.add_argument("--float-epochs", type=int, default=8)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
