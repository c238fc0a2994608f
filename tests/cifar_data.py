"""A miniature of the data folder: parquet files in the Hugging Face layout, weights as safetensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lq_plugin.demo.resnet import CifarResNet


def write_split(path: Path, rows: int, seed: int) -> np.ndarray:
    """Write `rows` random images, losslessly encoded; the pixels `[rows, 32, 32, 3]`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    encoded = []
    for index, image in enumerate(pixels):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format="PNG")
        encoded.append({"bytes": stream.getvalue(), "path": f"{index}.png"})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": encoded, "label": [i % 10 for i in range(rows)]}), path)
    return pixels


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 96 train and 24 test images and the weights of a ResNet-8 and a ResNet-20."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder / "cifar10" / "train.parquet", 96, seed=0)
    write_split(folder / "cifar10" / "test.parquet", 24, seed=1)
    torch.manual_seed(0)
    for depth in (8, 20):
        model = CifarResNet(depth)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(std=0.1)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
        save_file(model.state_dict(), folder / f"resnet{depth}.safetensors")
    return folder
