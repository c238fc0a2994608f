"""scikit-learn's handwritten digits as a LightningDataModule."""

import torch
from lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split


class DigitsDataModule(LightningDataModule):
    """1,797 images of 8x8 pixels: 1,197 to train, 300 to validate, 300 to test."""

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train: Dataset | None = None
        self.data_val: Dataset | None = None
        self.data_test: Dataset | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.data_train is None:
            digits = load_digits()
            images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
            dataset = TensorDataset(images, torch.from_numpy(digits.target).long())
            generator = torch.Generator().manual_seed(42)
            self.data_train, self.data_val, self.data_test = random_split(dataset, [1197, 300, 300], generator)

    def _loader(self, dataset: Dataset, shuffle: bool) -> DataLoader:
        return DataLoader(
            dataset, batch_size=self.hparams.batch_size, num_workers=self.hparams.num_workers, shuffle=shuffle
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.data_train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.data_val, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.data_test, shuffle=False)
