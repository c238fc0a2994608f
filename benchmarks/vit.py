"""A small vision transformer for CIFAR-10, trained here: a second kind of model for `ptq_accuracy`.

    python -m benchmarks.vit            # trains, and keeps the weights in benchmarks/.cache/vit.safetensors

A convolutional stem (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021, arXiv 2106.14881),
four pre-norm layers of width 96 on 4 x 4 tokens, the mean of the tokens, a linear head: 0.4 M parameters.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from lq_plugin.demo.cifar10 import load_images, normalize

CACHE = Path(__file__).parent / ".cache" / "vit.safetensors"
WIDTH, LAYERS, HEADS = 96, 4, 4


class Layer(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). Tokens `[N, L, C]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Logits `[N, 10]` of normalized images `[N, 3, 32, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, WIDTH // 3, 2 * WIDTH // 3)
        convolutions = [
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in itertools.pairwise(sizes)
        ]
        self.stem = nn.Sequential(*convolutions, nn.Conv2d(sizes[-1], WIDTH, 3, 2, 1))
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.layers = nn.Sequential(*(Layer(WIDTH, HEADS) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(tokens)).mean(1))


def train(data: Path, epochs: int = 6, console: Console | None = None) -> VisionTransformer:
    """AdamW with one cycle, random crops and flips, on all train images; seed 0."""
    torch.manual_seed(0)
    images, labels = load_images(data, "train")
    model = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    batches = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images))[: batches * 128].split(128):
            x = _augmented(images[chosen])
            loss = F.cross_entropy(model(normalize(x)), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if console is not None:
            console.print(f"epoch {epoch + 1} of {epochs}: loss {total / batches:.3f}")
    return model.eval()


def _augmented(x: Tensor) -> Tensor:
    """One shift of up to 4 pixels for the batch, and a flip of half of the images."""
    dx, dy = torch.randint(0, 9, (2,)).tolist()
    x = F.pad(x, (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
    flip = torch.rand(len(x)) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(3), x)


def load_vit(data: Path, console: Console | None = None) -> VisionTransformer:
    """The trained model; the first call trains it (about 15 minutes on one core) and keeps its weights."""
    if not CACHE.exists():
        model = train(data, console=console)
        CACHE.parent.mkdir(exist_ok=True)
        save_file(model.state_dict(), CACHE)
    model = VisionTransformer().eval()
    model.load_state_dict(load_file(CACHE))
    return model


def main(arguments: list[str] | None = None) -> None:
    options: argparse.Namespace = common.parser(__doc__).parse_args(arguments)
    common.start(options)
    console = Console()
    model = load_vit(options.data, console)
    images, labels = load_images(options.data, "test")
    with torch.inference_mode():
        right = sum(
            int((model(normalize(x)).argmax(1) == y).sum())
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
    console.print(
        f"{100 * right / len(labels):.2f} % of the test images, {sum(p.numel() for p in model.parameters()):,} "
        "parameters"
    )


if __name__ == "__main__":
    main()
