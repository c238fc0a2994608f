"""A CNN on a folder of images, one subfolder a class: `train/cat/1.jpg`, `val/dog/7.png`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


def read_images(folder: Path, classes: list[str], size: int) -> TensorDataset:
    """Returns images float32 `[N, 3, size, size]` in -1..1 and labels, in the order of names."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        for path in sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in ENDINGS):
            images.append(np.asarray(Image.open(path).convert("RGB").resize((size, size))))
            labels.append(label)
    if not images:
        raise FileNotFoundError(f"no images ({', '.join(sorted(ENDINGS))}) in {folder}/<class>/")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return TensorDataset(pixels / 127.5 - 1, torch.tensor(labels))


class ImageFolder(LightningDataModule):
    """Training and validation images of a folder, read into memory.

    Args:
        folder: with the subfolders `train` and `val`.
        size: pixels of a side; images are resized.
        batch_size: images of a batch.
    """

    def __init__(self, folder: str, size: int = 32, batch_size: int = 64) -> None:
        super().__init__()
        self.folder, self.size, self.batch_size = Path(folder), size, batch_size

    def setup(self, stage: str | None = None) -> None:
        train = self.folder / "train"
        classes = sorted(path.name for path in train.glob("*") if path.is_dir())
        self.train, self.val = (read_images(self.folder / part, classes, self.size) for part in ("train", "val"))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class FolderCNN(LightningModule):
    """Four convolutions with batch norm; logs `val/acc`.

    Args:
        classes: number of classes.
        width: channels of the first convolution.
        lr: learning rate of Adam.
    """

    def __init__(self, classes: int = 10, width: int = 16, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        widths = [3, width, 2 * width, 4 * width, 4 * width]
        blocks = [module for pair in pairwise(widths) for module in block(*pair)]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val/acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)
