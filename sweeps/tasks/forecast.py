"""An LSTM that forecasts a series: the next value from the last 32."""

from __future__ import annotations

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Waves(LightningDataModule):
    """Sums of two sines with noise, made anew from a seed; put your own series in their place.

    Args:
        series: number of series for training; a quarter of it for validation.
        steps: values that the model sees.
        batch_size: series of a batch.
    """

    def __init__(self, series: int = 2048, steps: int = 32, batch_size: int = 64) -> None:
        super().__init__()
        self.series, self.steps, self.batch_size = series, steps, batch_size

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (self.series + self.series // 4, 1)
        rates = 0.1 + 0.5 * torch.rand(2, *shape, generator=generator)
        phases = 6.3 * torch.rand(2, *shape, generator=generator)
        times = torch.arange(self.steps + 1)
        values = (rates * times + phases).sin().sum(0)
        values += 0.05 * torch.randn(values.shape, generator=generator)
        seen, wanted = values[:, :-1, None], values[:, -1:]
        self.train = TensorDataset(seen[: self.series], wanted[: self.series])
        self.val = TensorDataset(seen[self.series :], wanted[self.series :])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class Forecaster(LightningModule):
    """Two layers of LSTM and a linear one; logs `val/square`, the mean square of the error.

    Args:
        units: of each layer.
        lr: learning rate of Adam.
    """

    def __init__(self, units: int = 48, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.lstm = nn.LSTM(1, units, num_layers=2, batch_first=True)
        self.head = nn.Linear(units, 1)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.lstm(values)[0][:, -1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/square", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)
