"""What a search does with calibration data: always the same batches, whatever the order of a shuffling loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lq_plugin.callbacks import PTQ
from lq_plugin.callbacks.trainer.data import seeded

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Calibration(PTQ):
    """PTQ on the same batches in every process, whatever the order of a shuffling loader."""

    def quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        if self.dataloader is None and datamodule is not None:
            # A validation has set up its own stage only.
            datamodule.setup(stage="fit")
        # The statistics outlive the validation and its inference mode.
        with seeded(self.seed), torch.inference_mode(False), torch.no_grad():
            self.perform(trainer, pl_module)

    def perform(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is done on these batches."""
        super().quantize(trainer, pl_module)


class FloatRecording(Calibration):
    """Only records what the float model does with one batch."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Injects nothing."""

    def perform(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record(trainer, pl_module)


class LearnedRounding(Calibration):
    """The phase `reconstruct` alone, for a model that holds calibrated quantizers.

    Args:
        options: of the phase.
        calibration_batches, dataloader: see `PTQ`.
        seed: of the data's order.
    """

    def __init__(
        self, options: Mapping[str, Any], calibration_batches: int, dataloader: Iterable[Any] | None, seed: int
    ) -> None:
        # The plan is that of the quantizers which are there.
        super().__init__(
            "int8",
            calibration_batches,
            ["calibrate", {"reconstruct": options}],
            recalibrate=True,
            dataloader=dataloader,
        )
        self.phases = ("reconstruct",)
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Injects nothing."""
