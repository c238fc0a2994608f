"""A run with learned ranges in two stages, weight decay and momentum, that an earlier build interrupts."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QAT, QuantPlan, Rule


class Module(L.LightningModule):
    """A small network whose optimizer decays every parameter of its one group."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(epochs: int, checkpoint: Path | None = None) -> L.Trainer:
    """Trains a new module until `epochs` are over, from a checkpoint if there is one."""
    plan = QuantPlan([
        Rule("*", weight="int8 per_channel lsq", input="uint8 affine lsq"),
        Rule("*", weight="int4 per_channel lsq", input="uint4 affine lsq", start="epoch 1"),
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.rand(32, 8, generator=generator), torch.randn(32, 4, generator=generator))
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[QAT(plan)],
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(samples, 8), ckpt_path=checkpoint, weights_only=False)
    return trainer
