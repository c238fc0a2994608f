"""From a CNN to a file for TensorRT: QAT on its grid, one ONNX file that keeps NVIDIA's rules, checked twice.

TensorRT's explicit quantization knows signed integers without zero points only. `QAT("w8a8", target="tensorrt")` trains
on that grid: what a plan asks for otherwise (a zero point, 4 bits a channel) is changed where that is the same spec on
the target's grid, or refused before the first step with the nearest one that fits. The file is checked against every
documented rule when it is written, and its numbers by ONNX Runtime; the engine is built on the device:

    python examples/cnn_to_tensorrt.py --output runs/digits.onnx
    trtexec --onnx=runs/digits.onnx --stronglyTyped --saveEngine=runs/digits.engine
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning import Trainer

from lq_plugin import QAT, Export
from lq_plugin.demo.digits import DigitsDataModule, trained_cnn
from lq_plugin.export import Certificate, certify
from lq_plugin.export.inputs import inputs_of
from lq_plugin.export.tensorrt import RULES, lint


def main(arguments: list[str] | None = None) -> Certificate:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/digits.onnx"))
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args(arguments)

    data = DigitsDataModule()
    model = trained_cnn()
    callbacks = [QAT("w8a8", target="tensorrt"), Export(args.output, target="tensorrt")]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=callbacks, **quiet).fit(model, datamodule=data)

    findings = lint(args.output)
    assert not findings, findings
    found = certify(model.eval(), args.output, inputs_of(data.val_dataloader(), 4), target="tensorrt")
    print(f"{len(RULES)} rules kept; {found.summary()}")
    return found


if __name__ == "__main__":
    main()
