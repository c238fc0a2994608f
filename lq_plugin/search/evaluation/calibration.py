"""Work on calibration data before a validation: always the same batches, also where a loader shuffles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lq_plugin.callbacks import PTQ
from lq_plugin.callbacks.phases import TrainerContext
from lq_plugin.callbacks.trainer.data import seeded
from lq_plugin.ptq.phases import PhaseContext
from lq_plugin.utilities.lightning_packages import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@contextmanager
def same_batches(trainer: Trainer, dataloader: Iterable[Any] | None, seed: int | None) -> Iterator[None]:
    """A context for the start of a validation in which calibration data comes in the order that `seed` gives.

    Args:
        trainer: that validates.
        dataloader: calibration data; None: that of the Trainer's datamodule, which is set up for it.
        seed: of the order.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if dataloader is None and datamodule is not None:
        # A validation has set up its own stage only.
        datamodule.setup(stage="fit")
    # What is found outlives the validation and its inference mode.
    with seeded(seed), torch.inference_mode(False), torch.no_grad():
        yield


class Calibration(PTQ):
    """PTQ on the same batches in every process."""

    def quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the phases, see `PTQ`."""
        with same_batches(trainer, self.dataloader, self.seed):
            super().quantize(trainer, pl_module)


class OnCalibrationData(Callback):
    """Calls a function on the module as it is, with the same batches in every process, when a validation starts.

    Args:
        function: is given the module and its calibration data; what it returns is kept in `result`.
        calibration_batches: how many batches there are.
        dataloader: calibration data; the datamodule's or the module's train dataloader when None.
        seed: of the order of the data.
    """

    def __init__(
        self,
        function: Callable[[PhaseContext], Any],
        calibration_batches: int = 1,
        dataloader: Iterable[Any] | None = None,
        seed: int | None = None,
    ) -> None:
        self.function, self.calibration_batches = function, calibration_batches
        self.dataloader, self.seed = dataloader, seed
        self.result: Any = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the function."""
        with same_batches(trainer, self.dataloader, self.seed):
            self.result = self.function(TrainerContext(trainer, pl_module, self.dataloader, self.calibration_batches))
