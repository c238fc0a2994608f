"""A data set without a download and a small CNN for it: the user's own module, untouched.

Nothing here knows of quantization.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

NUM_CLASSES = 10


class DigitsDataModule(LightningDataModule):
    """scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, 10 classes.

    Every batch is `(images [B, 1, 8, 8] float32 in 0..1, labels [B] int64)`. The split is stratified and
    always the same: 1,077 images to train, 360 to validate, 360 to test.

    Args:
        batch_size: images a batch.
        num_workers: processes that load; 0 loads in this one, the fastest for data this small.

    Raises:
        ImportError: in `setup`, when scikit-learn is missing.
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.splits: dict[str, TensorDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("DigitsDataModule needs scikit-learn: pip install 'lq_plugin[demo]'") from error
        digits = load_digits()
        rest, test = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
        train, val = train_test_split(rest, test_size=360, stratify=digits.target[rest], random_state=0)
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
        labels = torch.from_numpy(digits.target).long()
        for name, index in {"train": train, "val": val, "test": test}.items():
            self.splits[name] = TensorDataset(images[index], labels[index])

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.splits[split], batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader("test")


class ResidualBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), shapes `[B, C, H, W]` in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(x + self.bn2(self.conv2(y)))
        return y


class DigitsCNN(LightningModule):
    """A small residual CNN for 8x8 images. Logs `train/loss`, `val/loss`, `val/acc`, `test/loss`, `test/acc`.

    Args:
        width: channels of the first convolution; the later ones have twice as many.
        lr: peak learning rate of the one-cycle schedule.
        weight_decay: of AdamW.
    """

    def __init__(self, width: int = 16, lr: float = 5e-3, weight_decay: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.stem = _conv_bn_relu(1, width)
        self.down = _conv_bn_relu(width, 2 * width, stride=2)
        self.block = ResidualBlock(2 * width)
        self.mix = _conv_bn_relu(2 * width, 2 * width, stride=2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, NUM_CLASSES))
        self.loss = nn.CrossEntropyLoss()
        self.val_acc = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.test_acc = MulticlassAccuracy(NUM_CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 1, 8, 8]` to logits `[B, 10]`."""
        y: Tensor = self.head(self.mix(self.block(self.down(self.stem(x)))))
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.loss(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        y: Tensor = loss
        return y

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels))
        self.log(f"{stage}/acc", accuracy, prog_bar=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        y: Tensor = self(batch[0])
        return y

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained_cnn(epochs: int = 8, width: int = 16, seed: int = 0) -> DigitsCNN:
    """Returns a trained float `DigitsCNN`, after a few seconds, with about 97 % of the test images right.

    Args:
        epochs: of training.
        width: channels of the first convolution.
        seed: of weights and order.
    """
    seed_everything(seed, verbose=False)
    model = DigitsCNN(width)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(max_epochs=epochs, accelerator="cpu", logger=False, **quiet).fit(model, datamodule=DigitsDataModule())
    return model


def _conv_bn_relu(channels: int, filters: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()
    )
