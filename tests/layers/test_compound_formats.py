"""Every format in modules that hold several weights: what a Linear layer does with the same weight."""

import copy

import pytest
import torch
from torch import nn

from lq_plugin import CalibrationError, QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.model import quantized_layers
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.fidelity import layer_fidelity
from lq_plugin.model.training import clip_latent_weights, enter_stage
from tests.quantizers.test_format_contract import INPUTS, WEIGHTS

MODULES = {
    "lstm": lambda: nn.LSTM(20, 12, bidirectional=True),
    "gru": lambda: nn.GRU(20, 12),
    "attention": lambda: nn.MultiheadAttention(20, 2),
    "separate": lambda: nn.MultiheadAttention(20, 2, kdim=20, vdim=16),
}


def run(module, x):
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x[..., : module.vdim])[0]
    return module(x)[0]


def ready(module, plan, x):
    net = nn.ModuleDict({"m": module})
    prepare(net, plan)
    calibrate(net, [x], lambda batch: run(module, batch))
    return net


@pytest.fixture(params=MODULES, ids=list(MODULES))
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]()


@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights(spec, module):
    torch.manual_seed(0)
    before, x, plan = copy.deepcopy(module), torch.randn(5, 2, 20), QuantPlan([Rule("*", weight=spec)])
    net = ready(module, plan, x)
    with torch.no_grad():
        y = run(module.eval(), x)
        for _, layer in quantized_layers(net):
            linear = nn.Linear(*reversed(layer.weight.shape), bias=False).eval()
            linear.weight.copy_(layer.weight)
            prepare(nn.Sequential(linear), plan)
            linear.calibrate_weight()
            assert torch.equal(layer.quantized_weight(), linear.quantized_weight())
            assert not torch.equal(layer.quantized_weight(), layer.weight)
        other = nn.ModuleDict({"m": copy.deepcopy(before)})
        prepare(other, plan)
        other.load_state_dict(net.state_dict())
        assert torch.equal(run(other["m"].eval(), x), y)
    run(module.train(), x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None or ("weight" in name and "kmeans" in spec), (
            f"{name}: no centroids stand for it"
        )
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    assert 0 < cost(net).effective_bits < 32
    rows = layer_fidelity(net)
    assert len(rows) == len(quantized_layers(net))
    assert torch.isfinite(torch.tensor([[row.sqnr_db, row.minimum, row.maximum, row.scale_min] for row in rows])).all()
    remove(net)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize("spec", [spec for spec in INPUTS if spec != "xnor"])
def test_inputs(spec, module):
    torch.manual_seed(0)
    before, x, plan = copy.deepcopy(module), torch.randn(5, 2, 20), QuantPlan([Rule("*", input=spec)])
    net = ready(module, plan, x)
    with torch.no_grad():
        y = run(module.eval(), x)
        assert not torch.equal(y, run(before.eval(), x))
        other = nn.ModuleDict({"m": copy.deepcopy(before)})
        prepare(other, plan)
        other.load_state_dict(net.state_dict())
        assert torch.equal(run(other["m"].eval(), x), y)
    x.requires_grad_()
    run(module.train(), x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any()


def test_bad_weights_are_refused_with_the_name(module):
    path = next(name for name, p in module.named_parameters() if p.dim() == 2)
    module.get_parameter(path).data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=rf"m\.{path}\.weight"):
        ready(module, "w4 mse", torch.randn(5, 2, 20))


def test_latent_weights_are_clipped_and_stages_entered(module):
    net = nn.ModuleDict({"m": module})
    rules = [Rule("*", weight="sign"), Rule("*", weight="int4 per_channel mse", start="epoch 2")]
    prepare(net, QuantPlan(rules))
    layers = [layer for _, layer in quantized_layers(net)]
    enter_stage(layers, 0, 0, calibrate=True)
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(6)
    clip_latent_weights(layers)
    assert all(layer.weight.abs().max() == 1.0 for layer in layers)
    assert all(set(layer.quantized_weight().unique().tolist()) == {-1.0, 1.0} for layer in layers)
    changed = enter_stage(layers, 2, 0, calibrate=True)
    assert changed == [f"{name}.weight" for name, _ in quantized_layers(net)]
    assert all(2 < len(layer.quantized_weight()[0].unique()) <= 16 for layer in layers)


def test_lower_precisions_run(module):
    x = torch.randn(5, 2, 20)
    net = ready(module, "w4a8", x)
    want = run(module.train(), x).detach()
    if isinstance(module, nn.LSTM):
        try:
            with torch.autocast("cpu", torch.bfloat16):
                nn.LSTM(20, 12)(x)
        except RuntimeError as error:
            pytest.skip(f"torch cannot autocast a float LSTM to bfloat16 on this processor: {error}")
    with torch.autocast("cpu", torch.bfloat16):
        y = run(module, x)
    torch.testing.assert_close(y.float(), want, atol=0.05, rtol=0.05)
    y.float().square().sum().backward()
    assert all(layer.weight.grad is not None for _, layer in quantized_layers(net))
    y = run(net.bfloat16()["m"], x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, atol=0.05, rtol=0.05)
