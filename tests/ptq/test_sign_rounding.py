"""SignRound: its formulas and steps in NumPy, what tuned ranges are good for, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lq_plugin import QuantizationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.ptq.reconstruction.options import ReconstructOptions
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct

PAPER = {"method": "signround", "bias_learning_rate": 0.0, "input_learning_rate": 0.0}


def correlated(count: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, features, generator=generator)
    return torch.randn(count, 2, generator=generator) @ mixing + 0.1 * torch.randn(count, features, generator=generator)


def prepared(layer: nn.Module, x: Tensor, spec: str) -> nn.Module:
    net = nn.Sequential(layer)
    prepare(net, QuantPlan([Rule("*", weight=spec)]))
    calibrate(net, [x])
    return net.eval()


def numpy_signround(
    w: np.ndarray, x: np.ndarray, low: np.ndarray, high: np.ndarray, grid: tuple[int, int], affine: bool, steps: int
) -> np.ndarray:
    """Algorithm 1 on all samples, with gradients written out, float64; ranges are those of rows `[rows, 1]`."""
    least, most = grid
    target, v = x @ w.T, np.zeros_like(w)
    alpha, beta = np.ones_like(low), np.ones_like(low)
    best, kept = np.inf, w
    for step in range(steps):
        scale = (alpha * high - beta * low) / (most - least) if affine else alpha * high / most
        z_free = np.clip(least - beta * low / scale, least, most) if affine else 0.0 * scale
        z = np.round(z_free)
        free = np.round(w / scale + v + z)
        q = np.clip(free, least, most)
        rounded, inside = scale * (q - z), free == q
        error = ((x @ rounded.T - target) ** 2).mean()
        if error < best:
            best, kept = error, rounded
        gradient = (x @ rounded.T - target).T @ x
        grad_scale = (gradient * (q - z - np.where(inside, w / scale, 0.0))).sum(1, keepdims=True)
        grad_z = (gradient * np.where(inside, 0.0, -scale)).sum(1, keepdims=True)
        rate = (1 - step / steps) / steps
        v = np.clip(v - rate * np.sign(gradient * inside), -0.5, 0.5)
        if affine:
            span, inner = most - least, (z_free > least) & (z_free < most)
            # z = least - beta low / s, of which s has a part.
            grad_scale = grad_scale + grad_z * inner * beta * low / scale**2
            grad_alpha = grad_scale * high / span
            grad_beta = -grad_scale * low / span - grad_z * inner * low / scale
            beta = np.clip(beta - rate * np.sign(grad_beta), 0, 1)
        else:
            grad_alpha = grad_scale
        alpha = np.clip(alpha - rate * np.sign(grad_alpha), 0, 1)
    return kept


@pytest.mark.parametrize("spec", ["int3 per_channel minmax", "int3 affine per_channel minmax"])
def test_the_steps_are_those_of_the_paper(spec: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6, bias=False), correlated(64, 8)
    w, affine = layer.weight.detach().double().numpy(), "affine" in spec
    net = prepared(layer, x, spec)
    grid = layer.weight_quantizer.spec.grid
    scale, zero_point = (t.double().numpy() for t in layer.weight_quantizer.qparams(layer.weight.detach()))
    low, high = (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale
    want = numpy_signround(w, x.double().numpy(), low, high, (grid.quant_min, grid.quant_max), affine, 60)
    (unit,) = reconstruct(net, [x], by="layer", iterations=60, batch_size=64, **PAPER).units.values()
    assert unit.kept
    assert unit.iterations == 60
    np.testing.assert_allclose(layer.weight.detach().numpy(), want, atol=1e-5)
    assert not np.allclose(want, np.clip(np.round(w / scale), -4, 3) * scale, atol=1e-3), "not nearest rounding"


@pytest.mark.parametrize(
    "spec",
    ["int3 per_channel minmax", "int2 affine per_channel minmax", "int3 group4 affine minmax", "int3 minmax", "mx6"],
)
def test_it_beats_nearest_rounding_and_is_packed_bit_equal(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(16, 12), correlated(128, 16)
    target, net = layer(x).detach(), prepared(layer, x, spec)
    fresh, before = copy.deepcopy(net), float((net(x) - target).detach().square().mean())
    reconstruct(net, [x], by="layer", iterations=200, batch_size=64, **PAPER)
    assert float((net(x) - target).detach().square().mean()) < 0.8 * before
    assert torch.equal(layer.quantized_weight(), layer.weight)
    save_packed(net, tmp_path / "net.safetensors")
    load_packed(fresh, tmp_path / "net.safetensors")
    assert torch.equal(fresh(x), net(x))


@pytest.mark.parametrize("grid", ["", " affine"])
def test_tuned_ranges_are_better_than_rounding_alone(grid: str) -> None:
    """Ranges of the extremes of two bits are too wide."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), correlated(128, 32) + torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
    net = prepared(layer, x, f"int2 per_channel{grid} minmax")
    options = {"by": "layer", "iterations": 200, "batch_size": 128, **PAPER}
    (alone,) = reconstruct(copy.deepcopy(net), [x], scale_learning_rate=0.0, **options).units.values()
    (both,) = reconstruct(net, [x], **options).units.values()
    assert alone.after < alone.before
    assert both.after < 0.9 * alone.after


def test_other_levels_and_methods_are_refused_by_name() -> None:
    net, x = prepared(nn.Linear(32, 4), correlated(64, 32), "mxfp4"), correlated(64, 32)
    before = net[0].weight.detach().clone()
    found = reconstruct(net, [x], by="layer", iterations=5, **PAPER)
    assert found.skipped == {"0": "SignRound tunes integers, mxfp4 has other levels"}
    assert torch.equal(net[0].weight, before)
    with pytest.raises(QuantizationError, match="method is one of adaround, signround, got 'sign'"):
        reconstruct(net, [x], method="sign")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.01),
        ("scale_learning_rate", 0.01),
        ("regularization", 0.0),
        ("beta", [20.0, 4.0]),
        ("warm_up", 0.0),
    ],
)
def test_options_that_would_do_nothing_are_refused(name: str, value: object) -> None:
    with pytest.raises(QuantizationError, match=f"{name} is an option of adaround, not of signround"):
        ReconstructOptions(method="signround", **{name: value})
    assert getattr(ReconstructOptions(**{name: value}), name) == value
    ReconstructOptions(method="signround", scale_learning_rate=0.0, beta=[20.0, 2.0])


def test_folders_of_earlier_versions_say_nothing_of_a_method(tmp_path: Path) -> None:
    """What AdaRound kept before there was a method is gone on with; SignRound is another run."""
    net, x = prepared(nn.Linear(8, 4), correlated(64, 8), "int3 per_channel minmax"), correlated(64, 8)
    kept = []
    for method, options in (("adaround", {}), ("signround", PAPER)):
        folder = tmp_path / method
        reconstruct(copy.deepcopy(net), [x], by="layer", iterations=2, folder=str(folder), **options)
        kept.append("".join(path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file()))
    assert "method" not in kept[0]
    assert "signround" in kept[1]
