"""SmoothQuant: the factors by formula, the float function as it was, outliers tamed, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import CalibrationError, QuantizationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.ptq import run_phases
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.smooth_quant.smooth import Smoothing, SmoothingGroup, smooth_quant


class Block(nn.Module):
    """A pre-norm transformer layer with projections of its own; channels 3 and 7 of both norms are outliers."""

    def __init__(self, norm: type[nn.Module], size: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(size), norm(size)
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        self.gate, self.up = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size)
        self.dropout = nn.Dropout(0.1)
        with torch.no_grad():
            for layer in (self.norm1, self.norm2):
                layer.weight.uniform_(0.5, 1.5)
                layer.weight[[3, 7]] *= torch.tensor([80.0, 40.0])
            for reader in (self.q, self.k, self.v, self.gate, self.up):
                reader.weight[:, [3, 7]] *= 0.02

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm1(x))
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def toy(norm: type[nn.Module]) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Block(norm), Block(norm)).eval(), torch.randn(64, 6, 16)


@torch.no_grad()
def smoothed(net: nn.Module, *batches: Any, **options: Any) -> Smoothing:
    with float_forward(net.eval()):
        recording = record(net, lambda: net(batches[0]))
    return smooth_quant(net, batches, recording, **options)


NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_float_function_stays(norm: type[nn.Module], alpha: float) -> None:
    net, x = toy(norm)
    net, x = net.double(), x.double()
    before, weights = net(x), copy.deepcopy(net.state_dict())
    result = smoothed(net, x, alpha=alpha)
    assert [(pair.producer, pair.readers) for pair in result.pairs] == [
        (f"{i}.{name}", tuple(f"{i}.{reader}" for reader in readers))
        for i in (0, 1)
        for name, readers in (("norm1", "qkv"), ("norm2", ("gate", "up")))
    ]
    torch.testing.assert_close(net(x), before, rtol=1e-10, atol=1e-10)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, weights[key])}
    assert {key.split(".", 1)[1].split(".")[0] for key in changed} == {"norm1", "norm2", "q", "k", "v", "gate", "up"}


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_the_factors_are_those_of_the_formula(alpha: float) -> None:
    net, x = toy(nn.LayerNorm)
    block = net[0]
    y = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias).reshape(-1, 16).double().numpy()
    reading = np.abs(np.stack([layer.weight.double().numpy() for layer in (block.q, block.k, block.v)])).max((0, 1))
    want = np.abs(y).max(0) ** alpha / reading ** (1 - alpha)
    result = smoothed(net, x[:10], x[10:50], x[50:], alpha=alpha)
    np.testing.assert_allclose(result.factors["0.norm1"].numpy(), want, rtol=1e-5)


def quantized_error(net: nn.Module, x: Tensor, target: Tensor, plan: str) -> float:
    net = copy.deepcopy(net)
    prepare(net, plan)
    calibrate(net, [x])
    return float((net(x) - target).square().mean())


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_outliers_no_longer_cost_the_other_channels_their_levels(norm: type[nn.Module]) -> None:
    net, x = toy(norm)
    target = net(x)
    # The same network a second time, prepared before it is smoothed.
    second = copy.deepcopy(net)
    before = quantized_error(net, x, target, "w8 a8 per_tensor")
    smoothed(net, x)
    assert quantized_error(net, x, target, "w8 a8 per_tensor") < before / 5
    prepare(second, "w8 a8 per_tensor")
    smoothed(second, x)
    calibrate(second, [x])
    assert float((second(x) - target).square().mean()) < before / 5


@torch.no_grad()
def test_self_attention_reads_its_norm() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).double()
    layer.norm1.weight[3] = 50.0
    layer.norm1.bias.normal_()
    net, x = nn.Sequential(layer).eval(), torch.randn(4, 5, 16, dtype=torch.float64)
    prepare(net, "w8a8")
    with float_forward(net):
        before = net(x)
        result = smoothed(net, x)
        torch.testing.assert_close(net(x), before, rtol=1e-10, atol=1e-10)
    assert [(pair.producer, pair.readers) for pair in result.pairs] == [
        ("0.norm1", ("0.self_attn",)),
        ("0.norm2", ("0.linear1",)),
    ]
    calibrate(net, [x])
    assert float((net(x) - before).abs().max()) < 0.1 * float(before.std())


class Chain(nn.Module):
    """Batch norm, two linear layers in a row, dropout between, and a bias that is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.a, self.dropout, self.b = nn.Linear(8, 10), nn.Dropout(0.5), nn.Linear(10, 12, bias=False)
        self.relu, self.c = nn.ReLU(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.dropout(self.a(self.bn(self.first(x)))))))


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
def test_batch_norms_and_linear_layers_in_a_row(folded: bool) -> None:
    torch.manual_seed(0)
    net, x = Chain().double(), torch.randn(50, 6, dtype=torch.float64)
    for tensor in (net.bn.weight, net.bn.running_mean, net.bn.bias):
        tensor.normal_()
    net.eval()
    before = net(x)
    if folded:
        fold_batch_norm(net, find_batch_norm_pairs(net, record(net, lambda: net(x)))[0])
    result = smoothed(net, x)
    assert result.pairs == (SmoothingGroup("bn", ("a",)), SmoothingGroup("a", ("b",)))
    torch.testing.assert_close(net(x), before, rtol=1e-10, atol=1e-10)
    assert {str(refused) for refused in result.refused} == {
        "'first': 'bn' (BatchNorm1d) reads it, which is no linear layer",
        "'b': 'relu' (ReLU) reads it, which is no linear layer",
        "'c': its output is what the model returns",
    }


class Conv1D(nn.Module):
    """Hugging Face's linear layer, by its published definition: the weight is `[C_in, C_out]`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


@torch.no_grad()
def test_transposed_weights_are_scaled_along_their_inputs() -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.LayerNorm(6), Conv1D(8, 6), Conv1D(6, 8)).double().eval(),
        torch.randn(4, 5, 6, dtype=torch.float64),
    )
    before, weight = net(x), net[1].weight.clone()
    result = smoothed(net, x)
    assert result.pairs == (SmoothingGroup("0", ("1",)), SmoothingGroup("1", ("2",)))
    torch.testing.assert_close(net(x), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net[1].weight, weight * result.factors["0"].unsqueeze(1) / result.factors["1"])


class Refusals(nn.Module):
    """Norms that must stay, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.LayerNorm(8, elementwise_affine=False)
        self.shared, self.residual, self.view, self.wide = (
            nn.LayerNorm(8),
            nn.RMSNorm(8),
            nn.LayerNorm(8),
            nn.LayerNorm((5, 8)),
        )
        self.cross, self.before_tied, self.tied_norm, self.twin = (nn.LayerNorm(8) for _ in range(4))
        self.image = nn.BatchNorm1d(5)
        self.twin.weight = self.tied_norm.weight
        self.fc = nn.ModuleList(nn.Linear(8, 8) for _ in range(11))
        self.twice = nn.Linear(8, 8)
        self.before_twice = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc[9].weight = self.fc[10].weight
        self.unused = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc[0](self.plain(x)))
        x = torch.tanh(self.fc[1](self.shared(x)))
        x = torch.tanh(self.fc[2](self.shared(x)))
        y = self.residual(x)
        x = y + self.fc[3](y)
        x = torch.tanh(self.fc[4](self.view(x).transpose(0, 1)).transpose(0, 1))
        x = torch.tanh(self.fc[5](self.wide(x)))
        x = torch.tanh(self.attention(self.cross(x), x, x)[0])
        x = torch.tanh(self.fc[9](self.before_tied(x)))
        x = torch.tanh(self.fc[7](self.tied_norm(x)) + self.fc[8](self.twin(x)))
        x = torch.tanh(self.fc[6](self.image(x)) + self.fc[10](x))
        return self.twice(torch.tanh(self.twice(self.before_twice(x))))


@torch.no_grad()
def test_what_is_not_safe_is_refused_with_a_reason() -> None:
    torch.manual_seed(0)
    net, x = Refusals().eval(), torch.randn(3, 5, 8)
    before, state = net(x), copy.deepcopy(net.state_dict())
    result = smoothed(net, x)
    assert result.pairs == ()
    assert torch.equal(net(x), before)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    reasons = {refused.name: refused.reason for refused in result.refused if not refused.name.startswith("fc")}
    expected = {
        "plain": "it has no affine weight",
        "shared": "it was called 2 times",
        "residual": "(add) reads it, which is no linear layer",
        "view": "'fc.4' (Linear) reads it, but through a view",
        "wide": "it normalizes [5, 8]",
        "cross": "'attention' (MultiheadAttention) reads it, but not as all of query, key and value",
        "before_tied": "but 'fc.9.weight' is shared with 'fc.10.weight'",
        "tied_norm": "'tied_norm.weight' is shared with 'twin.weight'",
        "twin": "'twin.weight' is shared with 'tied_norm.weight'",
        "image": "its channels are not the last dim of [3, 5, 8]",
        "before_twice": "'twice' (Linear) reads it, but it was called 2 times",
        "twice": "it was called 2 times",
        "unused": "it was not called",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], name


@torch.no_grad()
def test_channels_without_activation_or_weight_stay() -> None:
    net, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), torch.randn(20, 8)
    net[0].weight[2] = 0.0
    net[1].weight[:, 5] = 0.0
    before = net(x)
    factors = smoothed(net, x).factors["0"]
    assert factors[[2, 5]].tolist() == [1.0, 1.0]
    assert not (factors[[0, 1, 3, 4, 6, 7]] == 1.0).any()
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_bad_input_changes_nothing() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval(), torch.randn(20, 8)
    recording, state = record(net, lambda: net(x)), copy.deepcopy(net.state_dict())
    for alpha in (-0.1, 1.5, "half", True):
        with pytest.raises(QuantizationError, match="alpha is a share in 0..1, got"):
            smooth_quant(net, [x], recording, alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="0 batches"):
        smooth_quant(net, [], recording)
    with pytest.raises(CalibrationError, match="cannot smooth: '0' makes NaN or Inf"):
        smooth_quant(net, [x, x * torch.nan], recording)
    with pytest.raises(CalibrationError, match="cannot smooth: no batch reached '0'"):
        smooth_quant(net, [x], recording, run=lambda batch: None)
    net.half()
    net[0].weight.fill_(1000.0)
    net[1].weight.fill_(6e4)
    with pytest.raises(QuantizationError, match="'1.weight': the new values are not finite in torch.float16"):
        smooth_quant(net, [x.half()], recording, run=lambda batch: net[0](batch), alpha=1.0)
    assert (net[0].weight == 1000.0).all()
    net.float().load_state_dict(state)
    assert not net[0]._forward_hooks
    prepare(net, "w8a8")
    calibrate(net, [x])
    with pytest.raises(
        CalibrationError, match="cannot smooth: 2 quantizers have ranges already .*smooth before calibrating"
    ):
        smooth_quant(net, [x], recording)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


@torch.no_grad()
@pytest.mark.parametrize("activation", ["int8 per_token dynamic", "int8 dynamic"])
def test_inputs_with_ranges_of_run_time_are_smoothed(activation: str) -> None:
    net, x = toy(nn.LayerNorm)
    expected = net(x)
    plan = QuantPlan([Rule("*", weight="int8 per_channel", input=activation)])
    phases = ["equalize", "smooth_quant", "calibrate"]
    plain, smooth = copy.deepcopy(net), copy.deepcopy(net)
    run_phases(plain, plan, [x])
    context = run_phases(smooth, plan, [x], phases)
    assert len(context.results["smooth_quant"].pairs) == 4
    assert (smooth(x) - expected).norm() < 0.7 * (plain(x) - expected).norm()
