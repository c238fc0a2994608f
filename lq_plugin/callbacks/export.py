"""Write the quantized model as a file when a run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lq_plugin.callbacks.data import calibration_batches
from lq_plugin.errors import ExportError
from lq_plugin.export import save_packed
from lq_plugin.export.verify import inputs_of
from lq_plugin.model.calibrate import evaluating

SUFFIXES = (".safetensors", ".onnx")


class Export(Callback):
    """Writes the model at the end of a fit, or of an evaluation; beside `QAT` or `PTQ`.

    Args:
        path: `.safetensors` for a packed file, `.onnx` for ONNX.
        round_sums: for ONNX: round residual sums to 8 bits too, see `lq_plugin.export.onnx.export_onnx`.
        smallest: for ONNX: bits of the smallest integer type.
        batches: of training data that the ranges of sums come from; one of them is the example input.

    Raises:
        ExportError: another suffix; in the end, a model that the file cannot hold.

    >>> from lightning import Trainer
    >>> from lq_plugin import QAT
    >>> trainer = Trainer(callbacks=[QAT("w4a8"), Export("model.safetensors")], logger=False, accelerator="cpu")
    """

    def __init__(self, path: str | Path, round_sums: bool = False, smallest: int = 2, batches: int = 8) -> None:
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise ExportError(f"a model is exported to a file that ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
        self.round_sums, self.smallest, self.batches = round_sums, smallest, batches
        self.size: int | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.write(trainer, pl_module)

    on_test_end = on_predict_end = on_validation_end

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, on the first process."""
        if not trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(False), torch.no_grad(), evaluating(pl_module):
            if self.path.suffix == ".safetensors":
                self.size = save_packed(pl_module, self.path)
            else:
                self.size = self._onnx(trainer, pl_module)
        rank_zero_info(f"Export: {self.path}: {self.size:,} bytes")

    def _onnx(self, trainer: Trainer, pl_module: LightningModule) -> int:
        from lq_plugin.export import export_onnx  # not at the top: packed files need no onnx

        batches = inputs_of(calibration_batches(trainer, pl_module, None, self.batches), self.batches)
        options: dict[str, Any] = {"sums_from": batches if self.round_sums else None, "smallest": self.smallest}
        return export_onnx(pl_module, batches[:1], self.path, **options)
