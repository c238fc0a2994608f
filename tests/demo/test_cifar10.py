"""CIFAR-10 from parquet: pixels, rows, batches, and what is said when files are missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lq_plugin.demo.cifar10 import (
    MEAN,
    STD,
    Cifar10DataModule,
    DataError,
    crop_and_flip,
    find_parquet,
    image_loader,
    load_images,
    normalize,
)
from tests.cifar_data import write_split


def test_pixels_and_labels_are_those_that_were_written(tmp_path: Path) -> None:
    pixels = write_split(tmp_path / "cifar10" / "train.parquet", 25, seed=3)
    images, labels = load_images(tmp_path, "train")
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    np.testing.assert_array_equal(images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert labels.tolist() == [i % 10 for i in range(25)]
    part, part_labels = load_images(tmp_path, "train", 5, 9)
    assert torch.equal(part, images[5:9])
    assert part_labels.tolist() == [5, 6, 7, 8]


def test_the_public_layout_is_found_and_shards_are_joined_in_order(tmp_path: Path) -> None:
    first = write_split(tmp_path / "plain_text" / "train-00000-of-00002.parquet", 3, seed=0)
    second = write_split(tmp_path / "plain_text" / "train-00001-of-00002.parquet", 2, seed=1)
    images, _ = load_images(tmp_path, "train")
    np.testing.assert_array_equal(images.numpy(), np.concatenate([first, second]).transpose(0, 3, 1, 2))


def test_absent_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no test\*\.parquet in .*(\n.*)*hf download uoft-cs/cifar10"):
        find_parquet(tmp_path / "nowhere", "test")


@pytest.mark.parametrize(("start", "stop"), [(0, 97), (96, None), (5, 5), (-1, 4)])
def test_rows_that_are_not_there_are_refused(data_folder: Path, start: int, stop: int | None) -> None:
    with pytest.raises(DataError, match="holds 96"):
        load_images(data_folder, "train", start, stop)


def test_normalize_equals_numpy() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    expected = (images.numpy().transpose(0, 2, 3, 1) / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalize(images).numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_crop_and_flip_gives_shifted_and_mirrored_windows() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 256, (200, 3, 8, 6), dtype=torch.uint8)
    result = crop_and_flip(images, padding=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, source in zip(result, padded, strict=True):
        windows = {(top, left): source[:, top : top + 8, left : left + 6] for top in range(5) for left in range(5)}
        found = [
            (*at, flip)
            for at, window in windows.items()
            for flip in (False, True)
            if torch.equal(image, window.flip(2) if flip else window)
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 40  # of 50 that are possible


def test_loader_serves_each_image_once(data_folder: Path) -> None:
    images, labels = load_images(data_folder, "train")
    batches = list(image_loader(images, labels, batch_size=40, shuffle=True))
    assert [len(y) for _, y in batches] == [40, 40, 16]
    joined = torch.cat([x for x, _ in batches])
    assert not torch.equal(joined, normalize(images))
    assert torch.equal(joined.sum((1, 2, 3)).sort().values, normalize(images).sum((1, 2, 3)).sort().values)
    dataset = image_loader(images, labels, 1).dataset
    assert torch.equal(dataset[3][0], normalize(images)[3])


def test_datamodule_keeps_validation_images_out_of_training(data_folder: Path) -> None:
    data = Cifar10DataModule(data_folder, batch_size=16, held_out=32, augment=False)
    data.setup("fit")
    images, _ = load_images(data_folder, "train")
    assert torch.equal(torch.cat([x for x, _ in data.val_dataloader()]), normalize(images[64:]))
    assert sum(len(y) for _, y in data.train_dataloader()) == 64
    data.setup("test")
    assert sum(len(y) for _, y in data.test_dataloader()) == 24
    with pytest.raises(DataError, match="train_size=65 with held_out=32 does not fit 96"):
        Cifar10DataModule(data_folder, train_size=65, held_out=32).setup("fit")


def test_a_split_without_its_file_fails_only_when_it_is_asked_for(data_folder: Path, tmp_path: Path) -> None:
    shutil.copy(data_folder / "cifar10" / "train.parquet", tmp_path)
    data = Cifar10DataModule(tmp_path, held_out=8)
    data.setup("fit")
    with pytest.raises(DataError, match="test"):
        data.setup("test")
