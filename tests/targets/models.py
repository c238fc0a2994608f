"""Models of the targets' tests, prepared and calibrated, and the comparison with what a runtime computes."""

import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.export import export_model
from lq_plugin.export.target import TARGETS
from lq_plugin.model import record
from tests.models import MobileNet, randomize

X = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ACTIVATION = "uint8 affine"


class Hardswish(nn.Module):
    """Inverted residuals with depthwise convolutions and hard-swish, as MobileNetV3 has them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.same, self.down = self._block(16, 32, 16, 1), self._block(16, 48, 32, 2)
        self.head = nn.Linear(32, 10)

    @staticmethod
    def _block(inputs, hidden, outputs, stride):
        return nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(inplace=True),
            nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.down(x + self.same(x)).mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def rounded(*operations):
    return [Rule(name, input=ACTIVATION) for name in operations]


#: Models, and the rules that say what runtimes round besides the inputs of layers.
MODELS = {
    "resnet20": (CifarResNet, [*rounded("layer*.add_0", "mean_0"), Rule("linear", output=ACTIVATION)]),
    "mobilenet": (MobileNet, [*rounded("blocks.*.add_0", "mean_0"), Rule("head", output=ACTIVATION)]),
    "hardswish": (Hardswish, [*rounded("add_0", "type:hardswish", "mean_0"), Rule("head", output=ACTIVATION)]),
    "mlp": (mlp, [Rule("5", output=ACTIVATION)]),
}


def quantized(name, weight, rounds=True):
    """Returns a model; without `rounds` its plan has inputs of layers alone."""
    torch.manual_seed(0)
    make, rules = MODELS[name]
    net = randomize(make())
    plan = QuantPlan([Rule("*", weight=weight, input=ACTIVATION), *(rules if rounds else [])])
    prepare(net, plan, record(net, lambda: net(X)))
    calibrate(net, [X])
    return net


def compared(net, path, x=X):
    """Writes a file; returns the differences of its outputs, in its own steps, and its products."""
    target = next(target for target in TARGETS.values() if path.suffix == target.suffix)
    assert export_model(net, path, (X,), [X]) == path.stat().st_size
    (found,) = target.open(path, target.runtimes[0], None).run(x)
    levels = found.unique()
    with torch.no_grad():
        return (found - net(x)).abs() / levels.diff().min(), target.products(path, None)
