"""GPTAQ over models: each layer against the problem by hand, from the inputs of both models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import CalibrationError, PlanError, QuantizationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.functional.gptaq import asymmetric_target
from lq_plugin.functional.gptq import gptq_quantize
from lq_plugin.ptq import run_phases
from lq_plugin.ptq.gptq.quantize import gptq


def correlated(count: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    x = torch.randn(count, 3, generator=generator) @ torch.randn(3, size, generator=generator)
    return (x + 0.2 * torch.randn(count, size, generator=generator)).reshape(count, *shape)


def prepared(net: nn.Module, x: Tensor, weight: str = "int3 per_channel mse") -> nn.Module:
    prepare(net, QuantPlan([Rule("*", weight=weight, input="uint4 affine mse")]))
    calibrate(net, [x])
    return net.eval()


@torch.no_grad()
def test_each_layer_is_rounded_towards_the_float_models_output() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)), correlated(200, 12)
    floats = copy.deepcopy(net)
    prepared(net, x)
    first, second = net[0], net[2]
    gptq(net, [x[:70], x[70:]], asymmetric=True)
    inner = second.input_quantizer(net[1](first(x))).double()
    pairs = (
        (first, first.input_quantizer(x).double(), x.double(), floats[0].weight),
        (second, inner, floats[1](floats[0](x)).double(), floats[2].weight),
    )
    for layer, inputs, wanted, weight in pairs:
        hessian, difference = 2 * inputs.T @ inputs, 2 * (wanted - inputs).T @ inputs
        target = asymmetric_target(weight, hessian, difference)
        quantizer = layer.weight_quantizer
        want = gptq_quantize(target, hessian, quantizer.scale, quantizer.zero_point, quantizer.spec.grid)
        torch.testing.assert_close(layer.weight.detach(), want)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_the_linear_problem_on_unfolded_columns(groups: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=False), correlated(64, 4, 7, 7)
    weight = conv.weight.clone()
    net = prepared(nn.Sequential(conv), x)
    scale, zero_point = conv.weight_quantizer.scale.clone(), conv.weight_quantizer.zero_point.clone()
    gptq(net, [x[:30], x[30:]], asymmetric=True)
    columns, wanted = (
        F.unfold(t, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 4 * 9).double().chunk(groups, dim=1)
        for t in (conv.input_quantizer(x), x)
    )
    for g in range(groups):
        rows = slice(g * 8 // groups, (g + 1) * 8 // groups)
        hessian, difference = 2 * columns[g].T @ columns[g], 2 * (wanted[g] - columns[g]).T @ columns[g]
        want = gptq_quantize(
            asymmetric_target(weight[rows].flatten(1), hessian, difference),
            hessian, scale[rows].flatten(1), zero_point[rows].flatten(1), conv.weight_quantizer.spec.grid,
        )  # fmt: skip
        # Sums in another order may change the order of two columns.
        assert float(torch.isclose(conv.weight[rows].flatten(1), want).double().mean()) > 0.98


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.gelu(x))
        return x


@torch.no_grad()
@pytest.mark.parametrize("weight", ["int2 per_channel affine mse", "seq per_channel mse", "mxfp4"])
def test_the_outputs_of_a_deep_network_come_nearer_to_the_float_ones(weight: str) -> None:
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        net, x, test = Residual(), correlated(300, 16, seed=seed), correlated(300, 16, seed=seed)
        target = net(test)
        plain = prepared(net, x, weight)
        mine = copy.deepcopy(plain)
        gptq(plain, [x])
        result = gptq(mine, [x], asymmetric=True)
        assert len(result.layers) == 6
        assert all(fit.after <= fit.before for fit in result.layers.values())
        errors.append([float((net(test) - target).square().mean()) for net in (mine, plain)])
    mine_error, plain_error = map(sum, zip(*errors, strict=True))
    assert mine_error < 0.9 * plain_error


@torch.no_grad()
def test_a_layer_that_is_called_twice_and_one_that_is_left_out() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x[:, :8]) + self.fc(input=x[:, 8:]))

    torch.manual_seed(0)
    net, x = Twice(), correlated(100, 16)
    weight = net.fc.weight.clone()
    prepare(
        net, QuantPlan([Rule("fc", weight="int3 per_channel mse", input="uint4 affine"), Rule("out", weight="bwn")])
    )
    calibrate(net, [x])
    result = gptq(net.eval(), [x], asymmetric=True)
    assert result.layers["fc"].samples == 200
    assert set(result.skipped) == {"out"}
    both = torch.cat([x[:, :8], x[:, 8:]])
    inputs, quantizer = net.fc.input_quantizer(both).double(), net.fc.weight_quantizer
    hessian, difference = 2 * inputs.T @ inputs, 2 * (both.double() - inputs).T @ inputs
    target = asymmetric_target(weight, hessian, difference)
    want = gptq_quantize(target, hessian, quantizer.scale, quantizer.zero_point, quantizer.spec.grid)
    torch.testing.assert_close(net.fc.weight.detach(), want)


class Routed(nn.Module):
    """Sends a sample to the second layer where the first one's output is positive; that depends on the rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x[self.gate(x)[:, 0] > 0])


@torch.no_grad()
def test_inputs_that_the_float_model_does_not_have_are_refused_by_name() -> None:
    torch.manual_seed(0)
    net, x = Routed(), correlated(300, 8)
    prepared(net, x, "int2 per_channel")
    before = copy.deepcopy(net.state_dict())
    message = r"asymmetric GPTQ of 'expert': in call 0 on batch 0 its input is \[\d+, 8\], the float model gives"
    with pytest.raises(CalibrationError, match=message):
        gptq(net, [x], asymmetric=True, correct_batch_norm=False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if key in before)
    assert set(gptq(net, [x]).layers) == {"gate", "expert"}


def test_it_is_an_option_of_the_phase() -> None:
    torch.manual_seed(0)
    nets, x = [], correlated(60, 12)
    for options in ({}, {"asymmetric": True}):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)).eval()
        run_phases(net, "w3 mse a4 mse", [x], ["calibrate", {"gptq": options}])
        nets.append(net)
    assert not torch.equal(nets[0][2].weight, nets[1][2].weight)
    with pytest.raises(PlanError, match="asymmetric is true or false, got 'yes'"):
        run_phases(net, "w3", [x], ["calibrate", {"gptq": {"asymmetric": "yes"}}])
    with pytest.raises(QuantizationError, match="asymmetric is true or false, got 1"):
        gptq(net, [x], asymmetric=1)  # type: ignore[arg-type]


@torch.no_grad()
def test_an_error_puts_every_weight_back() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)), correlated(8, 12)
    prepared(net, x)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CalibrationError, match=r"GPTQ of '0': its Hessian is not positive definite"):
        gptq(net, [x], asymmetric=True, dampening=0.0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
