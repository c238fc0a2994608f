"""Formats that rounding can be chosen for return any weight on their levels unchanged, in files also."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lq_plugin import QuantPlan, QuantSpec, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export.codes import decode, encode
from lq_plugin.functional.grouping import block_mask, blocks, unblocks
from lq_plugin.intent.formats import FORMATS
from lq_plugin.quantizers import WeightQuantizer, make_weight_quantizer

SPECS = [
    "int4 per_channel mse",
    "int3 affine mse",
    "int2 lsq",
    "int4 group16:4 ragged",
    "int4 group16:4:channel ragged mse",
    "mx9",
    "mx6",
    "mx4",
    "mxfp8_e4m3",
    "mxfp8_e4m3:ceil",
    "mxfp8_e5m2:rceil",
    "mxfp6_e3m2:even",
    "mxfp6_e2m3",
    "mxfp4",
    "mxfp4:ceil",
    "mxfp4:rceil",
    "mxfp4:even",
    "mxfp4:mse",
    "mxint8",
    "nvfp4",
    "nvfp4:four_six",
    "nvfp4:unit",
    "if4",
    "fp8",
    "fp8:e5m2 per_channel percentile:99",
    "fp8 group16 ragged",
    "fp8 block8",
    "seq",
    "seq per_channel mse",
    "seq:ternary per_channel mse",
    "seq:ternary per_channel lsq",
    "seq group8 ragged",
    "twn",
    "twn:exact per_channel",
    "twn group8 ragged",
    "q4_0",
    "q8_0",
    "tq1_0",
    "tq2_0:exact",
]
#: Formats of weights without levels under fixed scales.
WITHOUT = {"sign", "bwn", "ttq", "kmeans"}
SHAPES = [(10, 40), (6, 20, 3, 3)]


def ready(spec: str, shape: tuple[int, ...], seed: int = 0) -> tuple[WeightQuantizer, Tensor, Tensor]:
    """Returns a calibrated quantizer, a weight whose rows differ in size, and its blocks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 1, shape[0]).reshape(-1, *[1 for _ in shape[1:]])
    weight = torch.randn(shape, generator=generator) * sizes
    weight[1] = 0.0
    quantizer = make_weight_quantizer(QuantSpec.parse(spec), "weight", shape)
    quantizer.calibrate(weight)
    return quantizer.eval(), weight, blocks(weight, quantizer.spec.granularity)


def test_every_format_of_weights_has_them_or_is_named_here() -> None:
    weights = {name for name, kind in FORMATS.items() if "weight" in kind.slots}
    assert {QuantSpec.parse(text).format_name for text in SPECS} == weights - WITHOUT
    for name in sorted(WITHOUT):
        assert not make_weight_quantizer(QuantSpec.parse(name + "2" * (name == "kmeans")), "w", (4, 4)).has_fixed_levels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
class TestContract:
    @torch.no_grad()
    def test_a_weight_lies_between_its_neighbours(self, spec: str, shape: tuple[int, ...]) -> None:
        quantizer, _, w = ready(spec, shape)
        assert quantizer.has_fixed_levels
        levels = quantizer.fixed_levels(w)
        low, high, place = levels.neighbours(w)
        assert (low <= high).all()
        inside = (low < high).expand_as(w)
        near = (low + (high - low) * place) * levels.step
        step = levels.step.expand_as(w)
        assert ((near - w).abs()[inside] <= 1e-5 * w.abs()[inside] + 1e-5 * step[inside]).all()
        nearest = levels.nearest(w)
        assert ((nearest == low * levels.step) | (nearest == high * levels.step)).all()
        other = torch.where(nearest == low * levels.step, high, low) * levels.step
        assert ((w - nearest).abs() <= (w - other).abs() * (1 + 1e-5) + 1e-5 * step).all()

    @torch.no_grad()
    def test_rounding_to_nearest_is_that_of_the_quantizer(self, spec: str, shape: tuple[int, ...]) -> None:
        if spec.startswith("twn"):
            pytest.skip("its threshold is not in the middle of its levels")
        quantizer, weight, w = ready(spec, shape)
        mine = unblocks(quantizer.fixed_levels(w).nearest(w), shape, quantizer.spec.granularity)
        assert torch.equal(mine, quantizer(weight))

    @torch.no_grad()
    @pytest.mark.parametrize("how", ["low", "high", "either", "any"])
    def test_weights_on_the_levels_come_back_unchanged(self, spec: str, shape: tuple[int, ...], how: str) -> None:
        for seed in range(3):
            quantizer, _, w = ready(spec, shape, seed)
            levels = quantizer.fixed_levels(w)
            generator = torch.Generator().manual_seed(seed)
            if how == "any":  # as the moved weights of GPTQ have it: any level, mostly smaller ones
                w = w * 2 * torch.rand(w.shape, generator=generator) ** 3
                mask = block_mask(shape, quantizer.spec.granularity)
                w = w if mask is None else w * mask
            low, high, _ = levels.neighbours(w)
            up = {"low": 0.0, "high": 1.0}.get(how, 0.5)
            chosen = torch.where(torch.rand(w.shape, generator=generator) < up, high, low) * levels.step
            weight = unblocks(chosen, shape, quantizer.spec.granularity)
            quantizer.keep_levels(levels)
            assert torch.equal(quantizer(weight), weight)
            state = copy.deepcopy(quantizer.state_dict())
            other = make_weight_quantizer(quantizer.spec, "weight", shape).eval()
            other.load_state_dict(state)
            assert torch.equal(other(weight), weight), "a checkpoint has the levels"
            parts = {name: part.values for name, part in encode(quantizer, weight).items()}
            assert torch.equal(decode(quantizer.spec, shape, parts), weight), "a file has them"

    @torch.no_grad()
    def test_the_levels_stay_when_the_weight_moves(self, spec: str, shape: tuple[int, ...]) -> None:
        if spec.startswith("mx") and spec[2].isdigit():
            pytest.skip("its steps become finer with smaller weights")
        quantizer, weight, w = ready(spec, shape)
        levels = quantizer.fixed_levels(w)
        quantizer.keep_levels(levels)
        quantizer.calibrate(0.1 * weight)
        again = quantizer.fixed_levels(0.1 * w)
        assert torch.equal(again.step, levels.step)
        quantizer.keep_levels(again)
        assert torch.equal(quantizer.fixed_levels(w).step, levels.step)


@pytest.mark.parametrize(
    "spec", ["fp8 per_channel", "seq per_channel mse", "seq:ternary per_channel mse", "twn", "int3"]
)
def test_scales_of_any_number_can_be_trained(spec: str) -> None:
    quantizer, _, w = ready(spec, (6, 40))
    levels = quantizer.fixed_levels(w)
    assert levels.trainable
    levels = replace(levels, scale=levels.scale * (1.0 + 0.1 * torch.rand(levels.scale.shape)))
    low, _, _ = levels.neighbours(w)
    quantizer.keep_levels(levels)
    assert torch.equal(quantizer(low * levels.step), low * levels.step)


@pytest.mark.parametrize("spec", ["int4 group16:4 ragged", "mxfp4", "nvfp4", "mx4"])
def test_scales_of_a_format_of_their_own_are_not_trained(spec: str) -> None:
    quantizer, _, w = ready(spec, (6, 40))
    assert not quantizer.fixed_levels(w).trainable


@torch.no_grad()
@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "fp8 per_channel", "mx4", "twn per_channel", "seq per_channel"])
def test_rows_of_a_table_are_read_on_the_fixed_levels(spec: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(12, 32))
    prepare(net, QuantPlan([Rule("*", weight=spec)]))
    calibrate(net, [torch.arange(12)])
    quantizer, table = net[0].weight_quantizer, net[0].weight.detach()
    quantizer.keep_levels(quantizer.fixed_levels(blocks(table, quantizer.spec.granularity)))
    net[0].weight *= 0.6
    index = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(net.eval()(index), net[0].quantized_weight()[index])


def test_fixed_scales_that_nvfp4_does_not_have_are_refused_by_files() -> None:
    quantizer, weight, _ = ready("nvfp4", (6, 32))
    quantizer.fix(torch.full_like(quantizer.scale, 0.3), torch.zeros_like(quantizer.zero_point))
    with pytest.raises(ExportError, match=r"weight: its fixed scales are no E4M3 numbers times one float"):
        encode(quantizer, weight)
