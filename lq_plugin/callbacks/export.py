"""Callback that writes the quantized model to a file when a run ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.callbacks.trainer.data import calibration_batches
from lq_plugin.callbacks.trainer.other_callbacks import move_before, tuners
from lq_plugin.errors import ExportError, is_integer, raise_all
from lq_plugin.export.inputs import inputs_of
from lq_plugin.export.request import Request
from lq_plugin.export.target import export_model, target_of
from lq_plugin.layers import computed_faults
from lq_plugin.model.calibrate import evaluating
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.utilities.files import make_folder
from lq_plugin.utilities.lightning_packages import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


class Export(Callback):
    """Callback next to `QAT` or `PTQ` that writes the model at the end of a fit or of an evaluation.

    It refuses impossible arguments at once, what the file cannot hold of the module and its plan at the start of the
    run, and batches that do not begin with an input tensor at the first of them.

    Args:
        path: of the file; its suffix chooses the target: `.safetensors` packed, `.onnx` ONNX.
        round_sums: for ONNX: round residual sums to 8 bits as well, see `lq_plugin.export.export_onnx`.
        smallest: for ONNX: bits of the smallest integer type.
        batches: of training data that the ranges of sums come from; one of them is the example input.
        dynamic_dims: for ONNX: dims of the input after the batch that may have any size: `[1]` for tokens `[N, L]`.
        target: name of the target, where several have the suffix.
        options: of another target, by name.

    Raises:
        ExportError: another suffix, impossible options; a run without quantization; a model that the file cannot hold.
        MissingPackageError: a package that the target needs.

    >>> from lightning import Trainer
    >>> from lq_plugin import QAT
    >>> trainer = Trainer(callbacks=[QAT("w4a8"), Export("model.safetensors")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        path: str | Path,
        round_sums: bool = False,
        smallest: int = 2,
        batches: int = 8,
        dynamic_dims: Sequence[int] = (),
        target: str | None = None,
        **options: Any,
    ) -> None:
        self.path = Path(path)
        self.target = target_of(path, target)
        self.options = {"round_sums": round_sums, "smallest": smallest, "dynamic_dims": dynamic_dims, **options}
        faults = self.target.faults(Request(self.options, self.path))
        if not is_integer(batches, 1):
            faults.append(f"batches is a number of batches, 1 or more, got {batches!r}")
        raise_all(ExportError, "Export", faults)
        self.target.need_packages(f"Export({str(path)!r})")
        self.batches = batches
        self.size: int | None = None
        self._inputs_checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # What cannot be exported is said before PTQ and QAT calibrate.
        move_before(trainer, self, (QuantizationCallback, *tuners()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inputs_checked = False
        self.check(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not at the start of the fit: a loader that is asked for a batch of its own does not go on where its checkpoint
        # says.
        if self.target.needs_inputs and not self._inputs_checked:
            self.check(pl_module, inputs_of([batch], 1))
            self._inputs_checked = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self.check(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self.write(trainer, pl_module)

    on_test_end = on_predict_end = on_validation_end

    def check(self, pl_module: LightningModule, inputs: list[Tensor] | None = None) -> None:
        """Refuses what cannot be exported in the end, as far as it is known.

        Args:
            pl_module: prepared.
            inputs: an example; None: not known yet.

        Raises:
            ExportError: naming every fault.
        """
        request = Request(self.options, self.path, pl_module, inputs=inputs, from_loader=self.target.needs_inputs)
        title = f"Export: {self.path} cannot hold {type(pl_module).__name__} under its plan"
        raise_all(ExportError, title, self.target.faults(request))
        for fault in computed_faults(quantized_layers(pl_module)) if inputs is None else ():
            # No error yet: what computes a weight may be taken away before the run ends.
            rank_zero_warn(f"Export: {fault}, before the run ends")

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file, on the first process."""
        if not trainer.is_global_zero:
            return
        make_folder(self.path.parent, ExportError)
        inputs = batches = None
        with torch.inference_mode(False), torch.no_grad(), evaluating(pl_module):
            if self.target.needs_inputs or self.target.needs_batches(self.options):
                found = inputs_of(calibration_batches(trainer, pl_module, None, self.batches), self.batches)
                inputs, batches = found[:1], found if self.target.needs_batches(self.options) else None
            self.size = export_model(pl_module, self.path, inputs, batches, self.target.name, **self.options)
        rank_zero_info(f"Export: {self.path}: {self.size:,} bytes")
