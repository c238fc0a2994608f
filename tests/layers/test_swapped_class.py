"""Layers whose class does not begin with nn.Module: `class Encoder(ABC, nn.LSTM)`."""

import copy
import pickle
from abc import ABC, abstractmethod

import pytest
import torch
from torch import nn

from lq_plugin import calibrate, prepare, remove
from lq_plugin.model.prepare import quantized_layers


class Interface(ABC):
    @abstractmethod
    def kind(self): ...


class OwnLinear(Interface, nn.Linear):
    def kind(self):
        return "own"


class Recurrent(ABC, nn.RNNBase):
    """Base that the library pytorch-forecasting has before its own LSTM."""


class OwnLSTM(Recurrent, nn.LSTM):
    pass


@pytest.mark.parametrize(("own", "plain", "shape"), [(OwnLinear, nn.Linear, (3, 4)), (OwnLSTM, nn.LSTM, (2, 3, 4))])
def test_it_computes_what_the_class_of_torch_does_and_comes_back(own, plain, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    modules = [nn.Sequential(kind(4, 5)) for kind in (own, plain)]
    modules[1].load_state_dict(modules[0].state_dict())
    for module in modules:
        prepare(module, "w4a8")
        calibrate(module, [x])
        module.eval()
    outputs = [module(x) for module in modules]
    first, second = (out if isinstance(out, torch.Tensor) else out[0] for out in outputs)
    assert torch.equal(first, second)
    assert [name for name, _ in quantized_layers(modules[0])] == [name for name, _ in quantized_layers(modules[1])]
    assert isinstance(modules[0][0], own)
    for copied in (copy.deepcopy(modules[0]), pickle.loads(pickle.dumps(modules[0]))):
        out = copied(x)
        assert torch.equal(first, out if isinstance(out, torch.Tensor) else out[0])
    remove(modules[0])
    assert type(modules[0][0]) is own
