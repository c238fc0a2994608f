"""A model with several outputs: it finds a rectangle in an image, and says which of two kinds it is."""

from __future__ import annotations

from itertools import pairwise

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Rectangles(LightningDataModule):
    """Images with one filled or hollow rectangle each, made anew from a seed; put your own in their place.

    A sample is an image float32 `[1, 24, 24]`, a box `[4]` (left, top, right, bottom, shares of the side) and a kind.

    Args:
        images: number of images for training; a quarter of it for validation.
        batch_size: images of a batch.
    """

    side = 24

    def __init__(self, images: int = 2048, batch_size: int = 64) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        count = self.images + self.images // 4
        low = torch.randint(1, 10, (count, 2), generator=generator)
        high = low + torch.randint(5, 12, (count, 2), generator=generator)
        kinds = torch.randint(0, 2, (count,), generator=generator)
        pixels = 0.2 * torch.randn(count, 1, self.side, self.side, generator=generator)
        for image, (left, top), (right, bottom), kind in zip(pixels, low, high, kinds, strict=True):
            image[:, top:bottom, left:right] += 1
            if kind:
                image[:, top + 1 : bottom - 1, left + 1 : right - 1] -= 1
        boxes = torch.cat([low, high], 1) / self.side
        parts = [(t[: self.images], t[self.images :]) for t in (pixels, boxes, kinds)]
        self.train, self.val = (TensorDataset(*tensors) for tensors in zip(*parts, strict=True))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


def overlap(found: Tensor, wanted: Tensor) -> Tensor:
    """Returns intersection over union of boxes `[N, 4]`, 0..1 each."""
    low, high = torch.maximum(found[:, :2], wanted[:, :2]), torch.minimum(found[:, 2:], wanted[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (found, wanted)]
    return common / (areas[0] + areas[1] - common).clamp(min=1e-9)


class Detector(LightningModule):
    """A backbone with two heads, boxes and kinds; logs `val/overlap` and `val/kind`.

    Args:
        width: channels of the first convolution.
        lr: learning rate of Adam.
    """

    def __init__(self, width: int = 16, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        widths = [1, width, 2 * width, 2 * width]
        self.backbone = nn.Sequential(
            *[
                module
                for inputs, outputs in pairwise(widths)
                for module in (nn.Conv2d(inputs, outputs, 3, 2, 1), nn.ReLU())
            ],
            nn.Flatten(),
        )
        self.box, self.kind = nn.Linear(2 * width * 9, 4), nn.Linear(2 * width * 9, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        return {"box": self.box(features).sigmoid(), "kind": self.kind(features)}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        found = self(batch[0])
        boxes = nn.functional.smooth_l1_loss(found["box"], batch[1], beta=0.05)
        return 10 * boxes + nn.functional.cross_entropy(found["kind"], batch[2])

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        found = self(batch[0])
        self.log("val/overlap", overlap(found["box"], batch[1]).mean())
        self.log("val/kind", (found["kind"].argmax(1) == batch[2]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)
