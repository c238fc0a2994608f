"""Weights that are computed: refused with the reason where torch's parametrize does it, quantized where a hook does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lq_plugin import PlanError, Rule, calibrate, prepare, remove
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.plan import QuantPlan

PLAN = "w4 mse a8 minmax"
pytestmark = [pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*weight_norm.* is deprecated")]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


PARAMETRIZED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv1d(4, 4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "own": lambda: parametrize.register_parametrization(nn.ConvTranspose1d(4, 4, 3), "weight", Doubled()),
    "embedding": lambda: parametrize.register_parametrization(nn.Embedding(4, 4), "weight", Doubled()),
    "LSTM": lambda: parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"),
    "attention": lambda: parametrize.register_parametrization(nn.MultiheadAttention(4, 2), "in_proj_weight", Doubled()),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_weights_are_refused_with_the_reason(name):
    """Whoever asks for them gets an error; a plan for all layers says in the ledger that they stay float; nothing changes."""
    torch.manual_seed(0)
    net = nn.Sequential(PARAMETRIZED[name](), nn.Linear(4, 2))
    state, kinds = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    ledger = prepare(net, PLAN)
    assert [layer for layer, _ in quantized_layers(net)] == ["1"]
    assert not ledger["0"].quantized
    assert any(word in ledger["0"].reason for word in ("parametrized", "no plain parameter"))
    remove(net)
    assert [type(m) for m in net.modules()] == kinds
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    with pytest.raises(PlanError, match=r"'0' matches no layer that can be quantized(?s:.*)\n  0: its .*(parametrized|no plain parameter)"):
        prepare(net, QuantPlan([Rule("*", weight="int8"), Rule("0", weight="int4")]))
    assert not quantized_layers(net)


HOOKED = {
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), F.linear, (3, 4)),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Conv1d(4, 4, 3)), F.conv1d, (2, 4, 8)),
    "spectral_norm, transposed": (lambda: nn.utils.spectral_norm(nn.ConvTranspose1d(4, 4, 3)), F.conv_transpose1d, (2, 4, 8)),
}


@pytest.mark.parametrize("name", HOOKED)
def test_weights_that_a_hook_computes_are_quantized_as_computed(name):
    """The older weight_norm and spectral_norm: what they compute is fake-quantized, and gradients reach what they compute it from."""
    torch.manual_seed(0)
    make, function, shape = HOOKED[name]
    layer, x = make(), torch.randn(shape)
    net = nn.Sequential(layer)
    keys = set(net.state_dict())
    ledger = prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    assert ledger["0"].quantized
    for training in (True, False):
        net.train(training)
        y = net(x)
        weight = layer.from_canonical(layer.weight_quantizer(layer.canonical(layer.weight)))
        assert len(layer.canonical(weight).detach()[0].unique()) <= 16
        assert torch.equal(y, function(layer.input_quantizer(x), weight, layer.bias))
    y.square().sum().backward()
    sources = [p for key, p in layer.named_parameters() if key.startswith("weight_") and "quantizer" not in key]
    assert sources
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sources)
    remove(net)
    assert set(net.state_dict()) == keys


class Cropped(nn.ConvTranspose1d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x)[..., 1:-1]


def test_subclasses_of_transposed_convolutions_run_their_own_forward():
    torch.manual_seed(0)
    layer, x = Cropped(4, 4, 3), torch.randn(2, 4, 8)
    net = nn.Sequential(layer)
    prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    net = copy.deepcopy(net)
    want = F.conv_transpose1d(net[0].input_quantizer(x), net[0].quantized_weight(), layer.bias)[..., 1:-1]
    assert torch.equal(net(x), want)
    remove(net)
    assert type(net[0]) is Cropped
