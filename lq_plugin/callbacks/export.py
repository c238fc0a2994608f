"""Write the quantized model as a file when a run has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lq_plugin.callbacks.base import QuantizationCallback
from lq_plugin.callbacks.trainer.data import calibration_batches
from lq_plugin.callbacks.trainer.other_callbacks import move_before, tuners
from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export import save_packed
from lq_plugin.export.checks import check_float32, stored_faults
from lq_plugin.export.options import SUFFIXES, dims_faults, need_onnx, smallest_faults
from lq_plugin.export.verify import inputs_of, need_one_input
from lq_plugin.layers import computed_faults
from lq_plugin.model.calibrate import evaluating
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.utilities.files import make_folder
from lq_plugin.utilities.lightning_packages import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Export(Callback):
    """Writes the model at the end of a fit, or of an evaluation; beside `QAT` or `PTQ`.

    What is wrong with its arguments is said at once; what the file cannot hold of the module and its plan at the start
    of the run, as far as it is known there; batches that do not begin with an input tensor at the first of them.

    Args:
        path: `.safetensors` for a packed file, `.onnx` for ONNX.
        round_sums: for ONNX: round residual sums to 8 bits too, see `lq_plugin.export.onnx_file.write.export_onnx`.
        smallest: for ONNX: bits of the smallest integer type.
        dynamic_dims: for ONNX: dims of the input behind the batch that may have any size, too: `[1]` for tokens `[N,
            L]`.
        batches: of training data that the ranges of sums come from; one of them is the example input.

    Raises:
        ExportError: another suffix, impossible options; a run without quantization; a model that the file cannot hold.
        MissingPackageError: for ONNX, without the packages for it.

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
    ) -> None:
        self.path = Path(path)
        self.onnx = self.path.suffix == ".onnx"
        faults = smallest_faults(smallest) + dims_faults(dynamic_dims)
        if self.path.suffix not in SUFFIXES.values():
            faults.append(
                f"a model is exported to a file that ends in {' or '.join(SUFFIXES.values())}, got {str(path)!r}"
            )
        if round_sums and not self.onnx:
            faults.append(f"round_sums is for a file that ends in .onnx, got {str(path)!r}")
        if dynamic_dims and not self.onnx:
            faults.append(f"dynamic_dims is for a file that ends in .onnx, got {str(path)!r}")
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            faults.append(f"batches is a number of batches, 1 or more, got {batches!r}")
        raise_all(ExportError, "Export", faults)
        if self.onnx:
            need_onnx(f"Export({str(path)!r})")
        self.round_sums, self.smallest, self.batches = round_sums, smallest, batches
        self.dynamic_dims = tuple(dynamic_dims)
        self.size: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # What cannot be exported is said before PTQ and QAT calibrate.
        move_before(trainer, self, (QuantizationCallback, *tuners()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not at the start of the fit: a loader that is asked for a batch of its own does not go on where its checkpoint
        # says.
        if self.onnx:
            (x,) = inputs_of([batch], 1)
            if max(self.dynamic_dims, default=0) >= x.ndim:
                raise ExportError(
                    f"dynamic_dims={list(self.dynamic_dims)}, but the input has {x.ndim} dims, {list(x.shape)}"
                )

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

    def check(self, pl_module: LightningModule) -> None:
        """Refuse what cannot be exported in the end, as far as it is known.

        Raises:
            ExportError: naming every fault.
        """
        name = type(pl_module).__name__
        layers = quantized_layers(pl_module)
        if not layers:
            raise ExportError(
                f"Export: {name} is not quantized, nothing would be in {self.path}: give the Trainer a QAT or PTQ "
                "callback, too"
            )
        for fault in computed_faults(layers):
            # No error yet: what computes a weight may be taken away before the run ends.
            rank_zero_warn(f"Export: {fault}, before the run ends")
        faults = stored_faults(pl_module)
        if self.onnx:
            from lq_plugin.export.onnx_file.write import knowable_faults  # not at the top: packed files need no onnx

            need_one_input(pl_module)
            check_float32(pl_module)
            faults += knowable_faults(pl_module)
        raise_all(ExportError, f"Export: {self.path} cannot hold {name} under its plan", faults)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, on the first process."""
        if not trainer.is_global_zero:
            return
        make_folder(self.path.parent, ExportError)
        with torch.inference_mode(False), torch.no_grad(), evaluating(pl_module):
            self.size = self._onnx(trainer, pl_module) if self.onnx else save_packed(pl_module, self.path)
        rank_zero_info(f"Export: {self.path}: {self.size:,} bytes")

    def _onnx(self, trainer: Trainer, pl_module: LightningModule) -> int:
        from lq_plugin.export import export_onnx

        batches = inputs_of(calibration_batches(trainer, pl_module, None, self.batches), self.batches)
        return export_onnx(
            pl_module, batches[:1], self.path, sums_from=batches if self.round_sums else None, smallest=self.smallest,
            dynamic_dims=self.dynamic_dims,
        )  # fmt: skip
