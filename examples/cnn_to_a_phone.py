"""From a trained CNN to the two files that phones run: `.pte` for ExecuTorch, `.tflite` for LiteRT.

* The plan names its target: weights get the runtime's narrow integers, and what it cannot run is refused before any
  work.
* The plan also rounds what such a runtime rounds besides the inputs of layers: here the logits. What it leaves out gets
  its range from calibration batches when the file is written, which a warning says.
* Each file is read back by its own runtime, which answers as PyTorch does, and says what it computes with integers.

    pip install "lq_plugin[executorch,litert]"
    python examples/cnn_to_a_phone.py --output runs/phone
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning import Trainer

from lq_plugin import PTQ, Export, QuantPlan, Rule
from lq_plugin.demo.digits import DigitsDataModule, trained_cnn
from lq_plugin.export import verify
from lq_plugin.export.target import TARGETS


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    plan = QuantPlan(
        [
            Rule("*", weight=args.weight, input="uint8 affine mse"),
            Rule("head.2", output="uint8 affine"),
        ],
        target="litert",
    )
    files = {name: args.output / f"digits{TARGETS[name].suffix}" for name in ("executorch", "litert")}
    data, model = DigitsDataModule(), trained_cnn(args.float_epochs)
    exports = [Export(path) for path in files.values()]
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[PTQ(plan), *exports])
    (scores,) = trainer.test(model, datamodule=data, verbose=False)

    images, _ = data.splits["test"].tensors
    agreements = {}
    for name, path in files.items():
        found = verify(model.eval(), path, [images])
        products = TARGETS[name].products(path, None)
        assert products is not None
        agreements[name] = found.agreement
        print(
            f"{path}: {path.stat().st_size:,} bytes, {sum(products.integer.values())} of {products.total} products of "
            f"integers, {100 * found.agreement:.2f} % of {found.samples} answers as in PyTorch"
        )
    return {"test/acc": scores["test/acc"], **agreements}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/phone"))
    parser.add_argument("--weight", default="int8 per_channel mse")
    parser.add_argument("--float-epochs", type=int, default=8)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
