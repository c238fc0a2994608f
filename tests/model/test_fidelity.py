"""Fidelity of each tensor against numpy on tensors caught by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq_plugin
from lq_plugin.model.measure.fidelity import (
    Errors,
    errors_on_statistics,
    layer_fidelity,
    watching,
    weight_bounds,
    weight_errors,
)
from lq_plugin.model.prepare import quantizers

PLANS = [
    "w4a8",
    "w3 mse a4 percentile:99",
    "w4 group4 ragged octav affine a8 per_channel",
    "int2 per_channel lsq / uint4 lsq",
    "int8 narrow / uint4 pact",
]


def reference(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> tuple[float, float]:
    """SQNR and clipping share, in numpy; scales broadcast against `x`."""
    wide, s, z = (np.asarray(t.detach(), dtype=np.float64) for t in (x, scale, zero_point))
    level = np.rint(wide / s) + z
    x_hat = (np.clip(level, quant_min, quant_max) - z) * s
    noise = ((wide - x_hat) ** 2).sum()
    return 10 * np.log10((wide**2).sum() / noise), float(((level < quant_min) | (level > quant_max)).mean())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))


def calibrated(plan: str) -> tuple[nn.Sequential, Tensor, dict]:
    model, x = net(), torch.randn(256, 10)
    lq_plugin.prepare(model, plan)
    return model, x, lq_plugin.calibrate(model, [x])


@pytest.mark.parametrize("plan", PLANS)
def test_rows_equal_numpy(plan: str) -> None:
    model, x, _ = calibrated(plan)
    hidden = torch.relu(model[0](x))
    rows = {(row.layer, row.slot): row for row in layer_fidelity(model, lambda: model(x))}
    assert list(rows) == [("0", "weight"), ("0", "input"), ("2", "weight"), ("2", "input")]
    for name, inputs in (("0", x), ("2", hidden)):
        layer = model[int(name)]
        quantizer = layer.input_quantizer
        scale, zero_point = quantizer.qparams()
        grid = quantizer.spec.grid
        sqnr, clipped = reference(inputs, scale, zero_point, grid.quant_min, grid.quant_max)
        row = rows[name, "input"]
        assert row.sqnr_db == pytest.approx(sqnr, abs=1e-3)
        assert row.clipping_share == pytest.approx(clipped, abs=1 / inputs.numel())
        assert (row.scale_min, row.scale_max) == (float(scale.min()), float(scale.max()))
        assert row.maximum == pytest.approx(float(((grid.quant_max - zero_point) * scale).max()))
        if "group4" not in plan:
            quantizer = layer.weight_quantizer
            scale, zero_point = quantizer.qparams(layer.weight)
            grid = quantizer.spec.grid
            sqnr, clipped = reference(layer.weight, scale, zero_point, grid.quant_min, grid.quant_max)
            assert rows[name, "weight"].sqnr_db == pytest.approx(sqnr, abs=1e-3)
            assert rows[name, "weight"].clipping_share == pytest.approx(clipped, abs=1e-9)
            assert rows[name, "weight"].spec == str(quantizer.spec)


def test_padding_of_a_ragged_group_is_no_element() -> None:
    model, _, _ = calibrated("uint3 group4 ragged percentile:60 affine")
    layer = model[0]
    errors = weight_errors(layer)
    assert errors.elements == 60
    weight = torch.cat([layer.weight.detach(), torch.zeros(6, 2)], dim=1).reshape(6, 3, 4)
    scale, zero_point = layer.weight_quantizer.qparams()
    sqnr, share = reference(weight, scale, zero_point, 0, 7)
    assert errors.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert errors.clipping_share == pytest.approx(share * 72 / 60)
    assert errors.clipping_share > 0


def test_min_max_clips_nothing_and_a_tight_range_does() -> None:
    model, x, _ = calibrated("w8a8")
    assert all(row.clipping_share == 0 for row in layer_fidelity(model, lambda: model(x)))
    model, x, _ = calibrated("w8 a8 percentile:90")
    shares = {(row.layer, row.slot): row.clipping_share for row in layer_fidelity(model, lambda: model(x))}
    assert 0.05 < shares["0", "input"] < 0.12


def test_statistics_say_what_the_batch_says() -> None:
    for plan in PLANS:
        model, x, statistics = calibrated(plan)
        known = errors_on_statistics(model, statistics)
        # Statistics are of the float model: only the first input is the same.
        measured = layer_fidelity(model, lambda: model(x))[1]  # noqa: B023
        assert known["0.input"].elements == x.numel()
        assert known["0.input"].sqnr_db == pytest.approx(measured.sqnr_db, abs=0.2), plan
        assert known["0.input"].clipping_share == pytest.approx(measured.clipping_share, abs=0.01), plan
        rows = layer_fidelity(model, measured=known)
        assert rows[1].sqnr_db == known["0.input"].sqnr_db


def test_without_a_range_or_a_batch_there_are_no_numbers() -> None:
    model = net()
    lq_plugin.prepare(model, "w4 mse a8")
    assert all(row.sqnr_db is None and row.minimum is None for row in layer_fidelity(model))
    assert weight_errors(model[0]) is None
    assert weight_bounds(model[0]) is None
    lq_plugin.calibrate(model, [torch.randn(4, 10)])
    rows = layer_fidelity(model)
    assert [row.sqnr_db is None for row in rows] == [False, True, False, True]
    assert all(row.minimum is not None for row in rows)
    # A live range needs no calibration.
    model = net()
    lq_plugin.prepare(model, "w4")
    assert layer_fidelity(model)[0].sqnr_db > 10


def test_watching_changes_nothing() -> None:
    model, x, _ = calibrated("w4a8")
    model[0].input_quantizer.set_enabled(False)
    model.train()
    plain = model(x)
    plain.square().mean().backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    state = torch.get_rng_state()
    with watching(model) as measured:
        watched = model(x)
    assert torch.equal(plain, watched)
    watched.square().mean().backward()
    assert torch.equal(gradient, model[0].weight.grad)
    assert torch.equal(state, torch.get_rng_state())
    # A quantizer that is switched off is measured all the same.
    assert measured["0.input"].sqnr_db > 20
    assert not any(q._forward_pre_hooks for q in quantizers(model))
    layer_fidelity(model, lambda: model(x))
    assert model.training


def test_watching_ends_when_the_pass_fails() -> None:
    model, _, _ = calibrated("w4a8")
    with pytest.raises(RuntimeError), watching(model):
        model(torch.randn(2, 3))
    assert not any(q._forward_pre_hooks for q in quantizers(model))


def test_sums_go_over_calls() -> None:
    model, x, _ = calibrated("w4a8")
    with watching(model) as parts:
        model(x[:100])
        model(x[100:])
    with watching(model) as whole:
        model(x)
    assert parts["0.input"].elements == whole["0.input"].elements == x.numel()
    assert parts["0.input"].sqnr_db == pytest.approx(whole["0.input"].sqnr_db, abs=1e-6)


def test_an_exact_tensor_has_infinite_sqnr() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    nn.init.zeros_(model[0].weight)
    lq_plugin.prepare(model, "w4")
    assert layer_fidelity(model)[0].sqnr_db == math.inf
    assert Errors().sqnr_db == math.inf


@pytest.mark.parametrize(("plan", "channels"), [("w4", True), ("int4", False), ("w4 group4 ragged", True)])
def test_weight_bounds_are_one_a_channel(plan: str, channels: bool) -> None:
    model, _, _ = calibrated(plan)
    layer = model[0]
    low, high = weight_bounds(layer)
    assert low.shape == high.shape == (6,)
    assert bool((low <= layer.weight.amin(1) + 1e-6).all())
    assert (len(set(high.tolist())) > 1) is channels
