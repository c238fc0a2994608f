"""ResNet-20, 32, 44 and 56 for CIFAR-10, and a LightningModule for any classifier.

Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), section 4.2.
The parameter names are those of Yerlan Idelbayev's public weights (github.com/akamaster/pytorch_resnet_cifar10).
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.demo.cifar10 import DataError

DEPTHS = (20, 32, 44, 56)

HOW_TO_GET_THE_WEIGHTS = """\
Public weights: https://github.com/akamaster/pytorch_resnet_cifar10, folder pretrained_models;
the .th files are read as they are, and safetensors files with the same keys"""


class BasicBlock(nn.Module):
    """The basic block: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    The shortcut is a stride-2 slice and zero pad (option A).

    Args:
        in_channels, channels: of input and output.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new_channels or self.stride > 1:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """Images float32 `[N, 3, 32, 32]` to logits `[N, 10]`.

    Args:
        depth: 6n + 2 layers, 20, 32, 44 or 56 in the paper.
        width: channels of the first stage.

    Raises:
        ValueError: when `depth` is not 6n + 2.

    >>> CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, depth: int = 20, width: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 (8, 14, {', '.join(map(str, DEPTHS))}), got {depth}")
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        y: Tensor = self.linear(x.mean((2, 3)))
        return y


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *(BasicBlock(in_channels if i == 0 else channels, channels, stride if i == 0 else 1) for i in range(blocks))
    )


def load_resnet(weights: str | Path, depth: int = 20) -> CifarResNet:
    """Returns a `CifarResNet` in eval mode with weights from a `.safetensors` or one of the public `.th` files.

    Raises:
        DataError: when the file is absent, saying where public weights are.
        RuntimeError: when its keys or shapes are not those of this depth.
    """
    path = Path(weights)
    if not path.is_file():
        raise DataError(f"no weights at {str(path)!r}.\n{HOW_TO_GET_THE_WEIGHTS}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): value for key, value in content.get("state_dict", content).items()}
    model = CifarResNet(depth)
    model.load_state_dict(state)
    return model.eval()


class LitClassifier(LightningModule):
    """Any classifier with cross-entropy, SGD and a one-cycle learning rate; logs `train/loss`, `val/acc`, `test/acc`.

    Args:
        net: maps inputs `[N, ...]` to logits `[N, classes]`.
        lr: highest learning rate of the cycle.
        weight_decay: L2 penalty of the parameters.
    """

    def __init__(self, net: nn.Module, lr: float = 0.04, weight_decay: float = 1e-4) -> None:
        super().__init__()
        # Lightning leaves each module in the mode it is in, and weights are loaded in evaluation mode.
        self.net, self.lr, self.weight_decay = net.train(), lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_accuracy("val/acc", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_accuracy("test/acc", batch)

    def _log_accuracy(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        accuracy = (self(x).argmax(1) == y).float().mean()
        # Lightning weighs each batch by its size, so a shorter last batch does not count double.
        self.log(name, accuracy, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(y))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
