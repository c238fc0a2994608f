"""Small networks for handwritten digits, to compare searches on: three of 3 layers whose 512 plans can all be scored,
so that the true front is known, and one of 60 layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

#: 8 choices for each layer.
SMALL_SPACE: dict[str, Any] = {
    "weight": [
        {"bit_widths": [2, 3, 4, 8], "granularities": ["per_channel"], "ranges": ["mse"]},
        {"bit_widths": [2, 3, 4, 8], "granularities": ["per_tensor"], "ranges": ["minmax"]},
    ],
    "input": "uint8 affine mse",
}
#: 7 choices for each of 60 layers.
DEEP_SPACE: dict[str, Any] = {
    "weight": {"bit_widths": [2, 3, 4, 5, 6, 7, 8], "granularities": ["per_tensor"], "ranges": ["minmax"]},
    "input": "uint8 affine mse",
}
#: What plans are compared by.
COST = "quantizable_effective_bits"
CPU = partial(Trainer, accelerator="cpu", devices=1)
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
#: Images to train and calibrate with; the other 997 score plans.
TRAIN = 800


class Digits(LightningDataModule):
    """scikit-learn's handwritten digits, 8 x 8 pixels: 800 to train with, 997 to score plans on."""

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
        labels = torch.from_numpy(digits.target).long()
        parts = train_test_split(range(len(labels)), train_size=TRAIN, stratify=digits.target, random_state=0)
        self.parts = [TensorDataset(images[part], labels[part]) for part in parts]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[0], 64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[1], 1000)


class Rows(nn.Module):
    """An image as a sequence of its rows: a projection, attention-free mixing along the rows, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(8, 24), nn.Conv1d(24, 32, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x.squeeze(1)).relu()).transpose(1, 2)
        return self.head(nn.functional.avg_pool1d(self.mix(y).relu(), 2).flatten(1))


def perceptron() -> nn.Module:
    sizes = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    return nn.Sequential(nn.Flatten(), *sizes)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Deep(nn.Module):
    """60 linear layers: 29 residual blocks of two between a projection and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        blocks = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(29)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1))
        for block in self.blocks:
            y = y + block(y)
        return self.head(y)


#: Those whose plans can all be scored.
SMALL = {"perceptron": perceptron, "convolutions": convolutions, "rows": Rows}
NETWORKS = {**SMALL, "deep": Deep}


class Classifier(LightningModule):
    """Trains and validates a network by cross-entropy and accuracy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.accuracy = net, MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val/acc", self.accuracy, on_epoch=True, on_step=False)
        self.log("val/loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 5e-3)


def trained(name: str, seed: int = 0, epochs: int = 15) -> Classifier:
    """Returns one of the networks, trained."""
    seed_everything(seed, verbose=False)
    model = Classifier(NETWORKS[name]())
    CPU(max_epochs=epochs, limit_val_batches=0, **QUIET).fit(model, datamodule=Digits())
    return model
