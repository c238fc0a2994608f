"""CIFAR-10 from a folder of parquet files in the layout of the Hugging Face `datasets` library.

A row holds `img`, a struct of the encoded image's `bytes` and its `path`, and `label`, 0..9. Decoding
takes about 0.11 ms an image (1 s for the test images, 6 s for the train images), so nothing is cached:
ask for the rows you need.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lq_plugin.errors import QuantizationError

#: Mean and standard deviation of the channels that the public weights were trained with (ImageNet's).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

HOW_TO_GET_THE_DATA = """\
CIFAR-10 in parquet form is public; get it with
    pip install huggingface_hub
    hf download uoft-cs/cifar10 --repo-type dataset --local-dir data/cifar10
and pass --data data"""


class DataError(QuantizationError, FileNotFoundError):
    """A data or weights file that is not there; the message says how to get it."""


def find_parquet(folder: str | Path, split: str) -> list[Path]:
    """Returns the Parquet files of a split.

    They are searched for below `folder/cifar10` and `folder`, as `train.parquet` or
    `plain_text/train-00000-of-00001.parquet`.

    Raises:
        DataError: when there is none, saying how to get the public data.
    """
    folder = Path(folder)
    for root in (folder / "cifar10", folder):
        if files := sorted(root.rglob(f"{split}*.parquet")):
            return files
    raise DataError(f"no {split}*.parquet in {str(folder)!r} or {str(folder / 'cifar10')!r}.\n{HOW_TO_GET_THE_DATA}")


def load_images(folder: str | Path, split: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """Decodes the rows `start..stop` of a split.

    Args:
        folder: folder that holds the parquet files, see `find_parquet`.
        split: `"train"` or `"test"`.
        start, stop: rows to read; `stop=None` reads to the end.

    Returns:
        Images uint8 `[N, 3, 32, 32]` and labels int64 `[N]`.

    Raises:
        DataError: when the files are absent, or hold fewer rows than were asked for.
        ImportError: without pyarrow or pillow.
    """
    try:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "CIFAR-10 in parquet form is read with two more packages: pip install pyarrow pillow"
        ) from error

    files = find_parquet(folder, split)
    table = pq.ParquetDataset(files).read(columns=["img", "label"])
    stop = table.num_rows if stop is None else stop
    if not 0 <= start < stop <= table.num_rows:
        raise DataError(f"rows {start}..{stop} of {split!r} were asked for, {files[0].parent} holds {table.num_rows}")
    table = table.slice(start, stop - start).combine_chunks()
    encoded = [chunk.field("bytes") for chunk in table["img"].chunks]
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(row.as_buffer())).convert("RGB")) for chunk in encoded for row in chunk]
    )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(
        table["label"].to_numpy().astype(np.int64)
    )


def normalize(images: Tensor) -> Tensor:
    """Returns images uint8 `[N, 3, H, W]` as float32 with zero mean and unit variance by `MEAN` and `STD`.

    >>> normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    tensor([-2.1179, -2.0357, -1.8044])
    """
    mean = torch.tensor(MEAN).view(3, 1, 1) * 255
    std = torch.tensor(STD).view(3, 1, 1) * 255
    return (images - mean).div_(std)


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Returns images `[N, C, H, W]`, each cropped at random after zero padding and flipped at random."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top = torch.randint(0, 2 * padding + 1, (n, 1)) + torch.arange(height)
    left = torch.randint(0, 2 * padding + 1, (n, 1)) + torch.arange(width)
    left = torch.where(torch.rand(n, 1) < 0.5, left.flip(1), left)
    rows = torch.arange(n).view(n, 1, 1)
    # Advanced indices around a slice put their dims first: [N, H, W, C].
    return padded[rows, :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2).contiguous()


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Serves whole batches: augmenting and normalising them at once is ten times faster than image by image."""

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[indices]
        return normalize(crop_and_flip(images) if self.augment else images), self.labels[indices]


def _as_is(batch: Any) -> Any:
    return batch


def image_loader(
    images: Tensor, labels: Tensor, batch_size: int, augment: bool = False, shuffle: bool = False
) -> DataLoader[Any]:
    """Returns a loader of batches: normalised images float32 `[N, 3, H, W]` and labels int64 `[N]`.

    Args:
        images: uint8 `[N, 3, H, W]`.
        labels: int64 `[N]`.
        batch_size: images of a batch.
        augment: crop and flip at random.
        shuffle: another order in each epoch.
    """
    return DataLoader(_Images(images, labels, augment), batch_size=batch_size, shuffle=shuffle, collate_fn=_as_is)


class Cifar10DataModule(LightningDataModule):
    """Train, validation (held out from train) and test images of CIFAR-10.

    Args:
        folder: folder that holds the parquet files, see `find_parquet`.
        batch_size: images a batch.
        train_size: train images to use, from the first row; None: all that are not held out.
        held_out: images at the end of the train split kept for validation.
        augment: random crops and flips of train images.

    Raises:
        DataError: on `setup`, when the files are absent.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 128,
        train_size: int | None = None,
        held_out: int = 5_000,
        augment: bool = True,
    ) -> None:
        super().__init__()
        self.folder, self.batch_size, self.train_size, self.held_out, self.augment = (
            folder,
            batch_size,
            train_size,
            held_out,
            augment,
        )
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str) -> None:
        if "train" not in self._splits:
            images, labels = load_images(self.folder, "train")
            last = len(labels) - self.held_out
            size = last if self.train_size is None else self.train_size
            if not 0 < size <= last:
                raise DataError(
                    f"train_size={size} with held_out={self.held_out} does not fit {len(labels)} train images"
                )
            self._splits["train"] = images[:size], labels[:size]
            self._splits["val"] = images[last:], labels[last:]
        if stage == "test" and "test" not in self._splits:
            self._splits["test"] = load_images(self.folder, "test")

    def train_dataloader(self) -> DataLoader[Any]:
        return image_loader(*self._splits["train"], self.batch_size, augment=self.augment, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return image_loader(*self._splits["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return image_loader(*self._splits["test"], self.batch_size)
