"""Models of `benchmarks.calibration`, and what they are calibrated on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.resnet18 import resnet18
from lq_plugin.demo.cifar10 import load_images, normalize
from lq_plugin.demo.resnet import load_resnet

MODELS = ("r20", "r18", "encoder")


def load(name: str, data: Path, batches: int) -> tuple[nn.Module, list[Tensor]]:
    """A float model and its calibration batches: r20 on CIFAR-10 (128 images each), r18 at 112 (16), encoder (16 × 128
    × 384)."""
    torch.manual_seed(0)
    if name == "r20":
        images = normalize(load_images(data, "train", 0, 128 * batches)[0])
        return load_resnet(data / "resnet_cifar10" / "resnet20_jpeg.safetensors", 20).eval(), list(images.split(128))
    if name == "r18":
        return resnet18(), [torch.randn(16, 3, 112, 112) for _ in range(batches)]
    layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return model.eval(), [torch.randn(16, 128, 384) for _ in range(batches)]
