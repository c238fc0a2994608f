"""Layers of the user with attributes of the names that quantized layers use: they keep them, or are refused before any
change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import PlanError, calibrate, prepare, remove
from lq_plugin.layers import QuantizedLayer
from lq_plugin.layers.registry import READ_FROM_CLASS

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Conv(nn.Conv2d):
    """Every name that is read from the class, and computes with them."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        for name in READ_FROM_CLASS:
            setattr(self, name, 4)
        self.integer = self.shared_input = False
        self.scale = 2.0

    def forward(self, x):
        assert {getattr(self, name) for name in READ_FROM_CLASS} == {4}
        assert self.integer is self.shared_input is False
        return super().forward(x) * self.scale / self.channels


def test_an_instance_keeps_its_names():
    net = nn.Sequential(Conv(), nn.ReLU())
    before, own = net(X).detach(), dict(net[0].__dict__)
    prepare(net, "w8a8")
    calibrate(net, [X])
    assert 0 < (net.eval()(X) - before).abs().max() < 0.05
    net.train()(X).sum().backward()
    assert torch.equal(copy.deepcopy(net).eval()(X), net.eval()(X))
    remove(net)
    assert torch.equal(net.eval()(X), before)
    assert net[0].__dict__.keys() == own.keys()


class OwnQuantizer(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.input_quantizer = nn.Identity()

    def forward(self, x):
        return F.linear(self.input_quantizer(x), self.weight, self.bias)


class OwnMethod(nn.Linear):
    def channels(self):
        return "mine"


class OwnProperty(nn.Conv2d):
    slots = property(lambda self: 3)


class OwnBuffer(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("layer_plan", torch.ones(1))


class OwnRecurrence(nn.LSTM):
    def run(self):
        return 1


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (OwnQuantizer(), "input_quantizer"),
        (OwnMethod(6, 6), "channels"),
        (OwnProperty(4, 4, 3), "slots"),
        (OwnBuffer(), "layer_plan"),
        (OwnRecurrence(6, 6), "run"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_collide_is_refused_before_any_change(layer, name):
    net = nn.Sequential(nn.Linear(6, 6), layer)
    kinds, keys = [type(module) for module in net.modules()], list(net.state_dict())
    with pytest.raises(PlanError, match=rf"rename them, or leave(.|\n)* 1\S* \(\w+\): {name}$"):
        prepare(net, "w8a8")
    assert [type(module) for module in net.modules()] == kinds
    assert list(net.state_dict()) == keys
    prepare(net, {"rules": [{"match": "*", "weight": "int8"}, {"match": "1*", "weight": "float"}]})
    assert isinstance(net[0], QuantizedLayer)
    assert type(net[1]) is type(layer)
