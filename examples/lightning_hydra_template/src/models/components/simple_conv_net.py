"""Three convolutions with batch norm and a linear classifier."""

from torch import Tensor, nn


class SimpleConvNet(nn.Module):
    def __init__(self, width: int = 16, output_size: int = 10) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, output_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
