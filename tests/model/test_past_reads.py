"""Weights that the model's own code reads past their layers, and the packed files of such models."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from lq_plugin import calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.model.past_reads import weights_read_past_layers


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.norm = nn.Linear(16, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.last = nn.Linear(8, 16)


class Tied(Base):
    def forward(self, x):
        return self.last(self.encoder(x)) + F.linear(F.relu(self.encoder(x)), self.encoder.weight.t())


class NeverCalled(Base):
    def forward(self, x):
        return self.last(F.linear(x, self.encoder.weight, self.encoder.bias))


class InALoop(Base):
    def forward(self, x):
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x) + F.linear(x, layer.weight)
        return self.last(x)


class InAComprehension(Base):
    def forward(self, x):
        x = self.encoder(x)
        return self.last(x + sum(F.linear(x, weight) for weight in [layer.weight for layer in self.layers]))


class ByIndex(Base):
    def forward(self, x):
        return self.last(F.linear(self.encoder(x), self.layers[1].weight))


def projected(x, layer):
    return F.linear(x, layer.weight)


class InAFunction(Base):
    def forward(self, x):
        return self.last(self._step(x))

    def _step(self, x):
        return projected(self.encoder(x), self.layers[0])


class OnlyLooksAtThem(Base):
    def forward(self, x):
        if isinstance(self.encoder.weight, torch.Tensor) and x.dtype != self.encoder.weight.dtype:
            x = x.to(self.encoder.weight.dtype)
        x = F.layer_norm(self.encoder(x), (self.encoder.weight.shape[0],), self.norm.weight)
        return self.last(x.to(self.last.weight.device))

    def reset(self):
        nn.init.ones_(self.encoder.weight)


FOUND = {
    Tied: {"encoder.weight": "Tied.forward"},
    NeverCalled: {"encoder.weight": "NeverCalled.forward"},
    InAFunction: dict.fromkeys(
        ("encoder.weight", "layers.0.weight", "layers.1.weight", "last.weight"), "InAFunction.projected"
    ),
    OnlyLooksAtThem: {},
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_found(kind):
    net = kind()
    prepare(net, "w4")
    assert weights_read_past_layers(net) == FOUND[kind]


@pytest.mark.parametrize("kind", [Tied, NeverCalled, InALoop, InAComprehension, ByIndex, InAFunction, OnlyLooksAtThem])
def test_the_file_holds_what_the_model_computes_with(kind, tmp_path):
    torch.manual_seed(0)
    net, x = kind(), torch.randn(6, 16)
    prepare(net, "w4")
    calibrate(net, [x])
    save_packed(net.eval(), tmp_path / "net.safetensors")
    other = kind()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x), net(x))


def test_what_lies_on_its_levels_is_held_once(tmp_path):
    torch.manual_seed(0)
    net, x = Tied(), torch.randn(6, 16)
    prepare(net, "w4")
    calibrate(net, [x])
    net.eval()
    twice = save_packed(net, tmp_path / "twice.safetensors")
    with torch.no_grad():
        weight = net.encoder.quantized_weight().clone()
        net.encoder.weight_quantizer.fix(*net.encoder.weight_quantizer.qparams(net.encoder.weight))
        net.encoder.weight.copy_(weight)
    assert save_packed(net, tmp_path / "net.safetensors") < twice - 16 * 8 * 3


class WithAWeightOfItsOwn(Base):
    """Its class is exchanged, since its forward pass multiplies a parameter; it reads a layer's weight also."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return self.last(F.linear(self.encoder(x), self.mixing) + F.linear(x, self.encoder.weight))


def test_reads_next_to_a_parameter_of_the_module_are_found():
    torch.manual_seed(0)
    model = WithAWeightOfItsOwn()
    prepare(model, "w4")
    assert weights_read_past_layers(model) == {"encoder.weight": "WithAWeightOfItsOwn.forward"}


class Magnitude(nn.Module):
    def forward(self, x):
        return x.abs()


def test_reads_of_a_module_with_a_parametrization_are_found():
    """Its class is one of torch's by its name, and the user's before it."""
    model = Tied()
    model.gain = nn.Parameter(torch.ones(1))
    register_parametrization(model, "gain", Magnitude())
    prepare(model, "w4")
    assert weights_read_past_layers(model) == {"encoder.weight": "Tied.forward"}
