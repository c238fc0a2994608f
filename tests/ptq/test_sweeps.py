"""GPTQ with sweeps of coordinate descent over models: every kind of scale, written, and what comes out."""

import copy

import pytest
import torch
from torch import nn

from lq_plugin import QuantizationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.functional.grouping import blocks
from lq_plugin.ptq.gptq.quantize import gptq


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.Flatten(), nn.Linear(256, 40)
    ).eval()


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=generator)
    return [(torch.randn(64, 64, generator=generator) @ mix).view(-1, 4, 4, 4) / 8 for _ in range(2)]


@pytest.mark.parametrize(
    "weight",
    ["int3 per_channel mse", "int4 group16 ragged affine mse", "int4 mse", "int4 group16:4 ragged",
     "int3 per_channel lsq", "mxfp4", "nvfp4", "seq per_channel mse"],
)  # fmt: skip
def test_layers_err_less_and_are_read_as_they_were_written(weight: str, tmp_path) -> None:
    x, results = inputs(), []
    for sweeps in (0, 3):
        model = net()
        prepare(model, QuantPlan([Rule("*", weight=weight)]))
        calibrate(model, x)
        results.append(gptq(model, x, sweeps=sweeps))
    plain, swept = (result.layers for result in results)
    # The first layer has the same inputs in both.
    assert swept["0"].after < plain["0"].after
    assert swept["0"].before == plain["0"].before
    with torch.no_grad():
        answer = model(x[0])
        torch.testing.assert_close(copy.deepcopy(model)(x[0]), answer, rtol=0, atol=0)
        save_packed(model, tmp_path / "model.safetensors", inputs=(x[0],))
        fresh = net()
        load_packed(fresh, tmp_path / "model.safetensors")
        assert torch.equal(fresh(x[0]), answer)


def test_what_its_error_says_is_what_the_layer_makes() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 32) @ torch.randn(32, 32)
    model = nn.Sequential(nn.Linear(32, 8, bias=False)).eval()
    plain = copy.deepcopy(model)
    prepare(model, "int3 group16 mse")
    calibrate(model, [x])
    fit = gptq(model, [x], sweeps=2).layers["0"]
    with torch.no_grad():
        share = float((model(x) - plain(x)).square().sum() / plain(x).square().sum())
    assert fit.after == pytest.approx(share, rel=1e-3)


def test_rows_whose_inputs_are_never_seen_keep_nearest_rounding() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 8, 6, 6)
    x[:, :4] = 0.0
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)).eval()
    prepare(model, "int4 group4 affine")
    calibrate(model, [x])
    quantizer, nearest = model[0].weight_quantizer, model[0].quantized_weight().clone()
    scale = quantizer.qparams(blocks(model[0].weight.detach(), quantizer.spec.granularity))[0].clone()
    fit = gptq(model, [x], sweeps=3).layers["0"]
    assert fit.nearest_rows == 0.5
    assert torch.equal(model[0].weight[:4], nearest[:4])
    assert torch.equal(quantizer.scale[:4], scale[:4])
    assert not torch.equal(model[0].weight[4:], nearest[4:])


def test_sweeps_are_counted() -> None:
    with pytest.raises(QuantizationError, match="sweeps is an integer from 0, got -1"):
        gptq(nn.Linear(2, 2), [], sweeps=-1)
