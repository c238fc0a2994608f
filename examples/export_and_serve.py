"""From a trained model to answers: PTQ, a packed file, an ONNX file, ONNX Runtime.

* The packed file holds every weight at its own bits and loads into a new module without Lightning, bit for bit.
* The ONNX file is standard QDQ: any runtime reads it. `onnx_session` opens it so that ONNX Runtime does not round float
  activations on its own.

    pip install "lq_plugin[onnx]"
    python examples/export_and_serve.py --output runs/served
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from lightning import Trainer

from lq_plugin import PTQ
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule, trained_cnn
from lq_plugin.export import export_onnx, load_packed, onnx_session, save_packed


class Digits:
    """Content of a service's memory: images in, digits out."""

    def __init__(self, path: Path) -> None:
        self.session = onnx_session(path)
        self.name = self.session.get_inputs()[0].name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`[B, 1, 8, 8]` float32 in 0..1 to `[B]` digits."""
        (logits,) = self.session.run(None, {self.name: images})
        return logits.argmax(1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    data, model = DigitsDataModule(), trained_cnn(args.float_epochs)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[PTQ("int8 per_channel / uint8 affine mse")])
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    model.eval()

    save_packed(model, args.output / "digits.safetensors")
    again = DigitsCNN()
    load_packed(again, args.output / "digits.safetensors")
    images, labels = data.splits["test"].tensors
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model(images))

    export_onnx(model, (torch.zeros(2, 1, 8, 8),), args.output / "digits.onnx")
    answer = Digits(args.output / "digits.onnx")
    accuracy = float((answer(images.numpy()) == labels.numpy()).mean())
    sizes = {name: (args.output / name).stat().st_size for name in ("digits.safetensors", "digits.onnx")}
    print(f"test/acc {scores['test/acc']:.4f} in PyTorch, {accuracy:.4f} in ONNX Runtime; bytes: {sizes}")
    return {"torch": scores["test/acc"], "onnx": accuracy}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/served"))
    parser.add_argument("--float-epochs", type=int, default=8)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
