"""GPTQ and learned rounding in every family of formats, against numpy and exhaustive search."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = np.concatenate([-E2M1[:0:-1], E2M1])


def e4m3(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.astype(np.float32)).clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()


def all_e4m3() -> np.ndarray:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    return np.unique(values[np.isfinite(values)])


def nvfp4_scales(w: np.ndarray, top: float = 448.0) -> tuple[np.ndarray, float]:
    """s · g of blocks of 16 that map their largest to 6, and g."""
    g = float(np.float32(np.abs(w).max() / (6 * top)))
    amax = np.abs(w.reshape(len(w), -1, 16)).max(-1)
    return e4m3(amax / 6 / g) * g, g


def four_six(w: np.ndarray) -> np.ndarray:
    six, g = nvfp4_scales(w, 256.0)
    amax = np.abs(w.reshape(len(w), -1, 16)).max(-1)
    four = e4m3(amax / 4 / g) * g
    errors = [np.square(nearest(w, np.repeat(s, 16, 1), E2M1) - w).reshape(len(w), -1, 16).sum(-1) for s in (six, four)]
    return np.where(errors[1] < errors[0], four, six)


def nearest(w: np.ndarray, scale: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The nearest of a table's levels times the scale; halves do not occur."""
    return table[np.abs((w / scale)[..., None] - table).argmin(-1)] * scale


#: Of `[rows, 32]` weights: scale of each element, and levels, by each format's definition in float64.
FORMATS = {
    "mxfp4": lambda w: (
        np.broadcast_to(2.0 ** (np.floor(np.log2(np.abs(w).max(1, keepdims=True))) - 2), w.shape),
        E2M1,
    ),
    "mxfp4:rceil": lambda w: (
        np.broadcast_to(2.0 ** np.ceil(np.log2(np.abs(w).max(1, keepdims=True) / 6)), w.shape),
        E2M1,
    ),
    "mxint8": lambda w: (
        np.broadcast_to(2.0 ** np.floor(np.log2(np.abs(w).max(1, keepdims=True))), w.shape),
        np.arange(-127, 128) / 64,
    ),
    "nvfp4": lambda w: (np.repeat(nvfp4_scales(w)[0], 16, 1), E2M1),
    "nvfp4:four_six": lambda w: (np.repeat(four_six(w), 16, 1), E2M1),
    "fp8 per_channel": lambda w: (np.broadcast_to(np.abs(w).max(1, keepdims=True) / 448, w.shape), all_e4m3()),
    "seq per_channel": lambda w: (
        np.broadcast_to(np.abs(w).max(1, keepdims=True) / 2, w.shape),
        np.array([-1.5, -0.5, 0.5, 1.5]),
    ),
    "seq:ternary per_channel": lambda w: (
        np.broadcast_to(np.abs(w).max(1, keepdims=True) * 2 / 3, w.shape),
        np.array([-1.0, 0.0, 1.0]),
    ),
    "twn per_channel": lambda w: (
        np.stack([np.full(len(row), np.abs(row)[np.abs(row) > 0.7 * np.abs(row).mean()].mean()) for row in w]),
        np.array([-1.0, 0.0, 1.0]),
    ),
    "mx4": lambda w: (mx4_steps(w), np.arange(-3, 4.0)),
}


def mx4_steps(w: np.ndarray) -> np.ndarray:
    exponent = np.floor(np.log2(np.abs(w.reshape(len(w), -1, 16)).max(-1)))
    pair = np.floor(np.log2(np.abs(w.reshape(len(w), -1, 2)).max(-1)))
    tau = np.minimum(1, np.repeat(exponent, 8, 1) - pair)
    return np.repeat(2.0 ** (np.repeat(exponent, 8, 1) - tau - 1), 2, 1)


def obq(weight: np.ndarray, x: np.ndarray, scale: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Optimal brain quantization in the order of falling diagonals, by explicit inverses (GPTQ, eqs. 2 and 3)."""
    w, h = weight.copy(), 2.0 * x.T @ x
    order = np.argsort(-np.diag(h), kind="stable")
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    inverse, out = np.linalg.inv(h), np.zeros_like(w)
    for j in order:
        out[:, j] = nearest(w[:, j], scale[:, j], table)
        w -= np.outer((w[:, j] - out[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return out


def correlated(count: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    x = torch.randn(count, 3, generator=generator) @ torch.randn(3, size, generator=generator)
    return (x + 0.2 * torch.randn(count, size, generator=generator)).reshape(count, *shape)


def prepared(layer: nn.Module, x: Tensor, spec: str) -> nn.Module:
    net = nn.Sequential(layer)
    prepare(net, QuantPlan([Rule("*", weight=spec)]))
    calibrate(net, [x])
    return net.eval()


LAYERS = {
    "linear": (lambda: nn.Linear(40, 6), (40,)),
    "conv": (lambda: nn.Conv2d(20, 6, 3, padding=1), (20, 4, 4)),
    "groups": (lambda: nn.Conv1d(36, 6, 3, groups=2), (36, 7)),
}
SPECS = [*FORMATS, "mxfp4:mse", "mxfp8_e4m3", "mxfp6_e2m3", "nvfp4:unit", "fp8 block8", "int4 group16:4 ragged", "q4_0"]


@torch.no_grad()
@pytest.mark.parametrize("spec", FORMATS)
def test_gptq_of_a_linear_layer_is_numpys(spec: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 6, bias=False), correlated(100, 32)
    w = layer.weight.double().numpy()
    scale, table = FORMATS[spec](w)
    net = prepared(layer, x, spec)
    if not spec.startswith("twn"):  # its threshold is not in the middle of its levels
        np.testing.assert_allclose(net[0].quantized_weight().numpy(), nearest(w, scale, table), rtol=1e-6, atol=1e-9)
    want = obq(w, x.double().numpy(), scale, table)
    fit = gptq(net, [x]).layers["0"]
    kept = np.abs(layer.weight.numpy() - want).max(1) < 1e-5
    assert kept.mean() == pytest.approx(1 - fit.nearest_rows), "rows that are not numpy's are rounded to nearest"
    assert kept.sum() >= 3
    assert not np.allclose(want, nearest(w, scale, table), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "fp8 per_channel", "seq per_channel mse", "twn"])
def test_gptq_of_a_convolution_is_the_linear_problem_on_unfolded_columns(spec: str) -> None:
    """Blocks run along the input channels for each kernel position: the linear layer's columns in another order."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(32, 6, 3, padding=1, bias=False), correlated(40, 32, 4, 4)
    w = conv.weight.clone()
    columns = F.unfold(x, 3, padding=1).transpose(1, 2).unflatten(2, (32, 9)).transpose(2, 3).reshape(-1, 9 * 32)
    linear = nn.Linear(9 * 32, 6, bias=False)
    linear.weight.copy_(w.flatten(2).transpose(1, 2).flatten(1))
    nets = prepared(conv, x, spec), prepared(linear, columns, spec)
    for net, inputs in zip(nets, (x, columns), strict=True):
        gptq(net, [inputs], dampening=0.1)
    mine = conv.weight.flatten(2).transpose(1, 2).flatten(1)
    assert float(torch.isclose(mine, linear.weight, atol=1e-6).double().mean()) > 0.99
    assert torch.equal(conv.quantized_weight(), conv.weight)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("spec", SPECS)
class TestContract:
    @torch.no_grad()
    def test_gptq_is_never_worse_than_nearest_rounding(self, spec: str, kind: str) -> None:
        torch.manual_seed(1)
        make, shape = LAYERS[kind]
        layer, x = make(), correlated(96, *shape)
        target = layer(x)
        net = prepared(layer, x, spec)
        before = float((net(x) - target).square().sum())
        result = gptq(net, [x[:40], x[40:]])
        assert not result.skipped
        assert torch.equal(layer.quantized_weight(), layer.weight), "the weights are the levels"
        after = float((net(x) - target).square().sum())
        assert after <= before * (1 + 1e-5)
        if not spec.startswith("twn") or kind == "linear":
            assert after < 0.9 * before, "the inputs are correlated: there is much to make up for"

    @torch.no_grad()
    def test_learned_rounding_is_never_worse_and_chooses_a_neighbour(self, spec: str, kind: str) -> None:
        torch.manual_seed(1)
        make, shape = LAYERS[kind]
        layer, x = make(), correlated(96, *shape)
        target, net = layer(x), prepared(layer, x, spec)
        quantizer = layer.weight_quantizer
        was = layer.weight.clone()
        before = float((net(x) - target).square().mean())
        result = reconstruct(
            net, [x], by="layer", iterations=60, batch_size=64, scale_learning_rate=0.0, bias_learning_rate=0.0
        )
        (fit,) = result.units.values()
        assert not result.skipped
        assert float((net(x) - target).square().mean()) <= before * (1 + 1e-5)
        if fit.kept:
            assert torch.equal(layer.quantized_weight(), layer.weight), "the weights are the levels"
            group = quantizer.spec.granularity
            levels = quantizer.fixed_levels(blocks(was, group))
            low, high, _ = levels.neighbours(blocks(was, group))
            near = [unblocks(level * levels.step, layer.weight.shape, group) for level in (low, high)]
            if not spec.startswith("mx4"):  # of which the steps are those of the rounded weight now
                assert ((layer.weight == near[0]) | (layer.weight == near[1])).all()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "nvfp4:four_six", "seq per_channel mse", "twn per_channel"])
def test_learned_rounding_is_near_the_best_of_all(spec: str) -> None:
    """All 2^8 ways to round eight weights of each neuron to the level below or above."""
    torch.manual_seed(0)
    x, layer = correlated(256, 8), nn.Linear(8, 12, bias=False)
    target, net = layer(x), prepared(layer, x, spec)
    group = layer.weight_quantizer.spec.granularity
    levels = layer.weight_quantizer.fixed_levels(blocks(layer.weight.detach(), group))
    low, high, _ = levels.neighbours(blocks(layer.weight, group))
    low, high = (unblocks(level * levels.step, layer.weight.shape, group) for level in (low, high))
    every = [
        (F.linear(x, torch.where(torch.tensor(ups), high, low)) - target).square().mean(0)
        for ups in itertools.product([False, True], repeat=8)
    ]
    errors, nearest_error = torch.stack(every), (net(x) - target).square().mean(0)
    fixed = {"scale_learning_rate": 0.0, "bias_learning_rate": 0.0}
    reconstruct(net, [x], by="layer", iterations=600, batch_size=256, learning_rate=0.05, **fixed)
    learned = (net(x) - target).square().mean(0)
    assert ((errors - learned).abs().amin(0) < 1e-5).all(), "each neuron has one of the roundings"
    best = errors.amin(0).mean()
    assert learned.mean() - best < 0.5 * (nearest_error.mean() - best)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["fp8:e5m2 per_channel", "seq per_channel mse", "seq:ternary mse", "twn per_channel"])
def test_scales_are_learned_with_the_roundings(spec: str) -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(24, 6), correlated(96, 24)
    target, net = layer(x), prepared(layer, x, spec)
    fixed = copy.deepcopy(net)
    before = layer.weight_quantizer.fixed_levels(layer.weight.detach()).step
    options = {"by": "layer", "iterations": 300, "batch_size": 64, "bias_learning_rate": 0.0}
    (plain,) = reconstruct(fixed, [x], scale_learning_rate=0.0, **options).units.values()
    (fit,) = reconstruct(net, [x], scale_learning_rate=1e-2, **options).units.values()
    assert fit.kept
    assert not torch.equal(layer.weight_quantizer.fixed_levels(layer.weight.detach()).step, before)
    assert torch.equal(layer.quantized_weight(), layer.weight)
    assert fit.after < fit.before
    assert fit.after < 1.2 * plain.after
    assert float((net(x) - target).square().mean()) < float("inf")
