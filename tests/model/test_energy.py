"""The estimate of energy against counts by hand, and its table against the figures that it comes from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lq_plugin
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost, plan_cost
from lq_plugin.model.measure.energy import mac_energy, read_energy

#: Picojoules of a bit of DRAM: 1.3 to 2.6 nJ for 64.
DRAM = (1300 + 2600) / 2 / 64


def plan(weight: str | None, read: str | None) -> LayerPlan:
    return LayerPlan(
        weight=None if weight is None else QuantSpec.parse(weight),
        input=None if read is None else QuantSpec.parse(read),
    )


def test_the_law_of_widths_meets_both_figures_for_integers() -> None:
    # Horowitz: multiplications of 8 and 32 bits take 0.2 and 3.1 pJ, an addition of 32 bits 0.1 pJ.
    assert mac_energy(8, 8) * 1e6 == pytest.approx(0.2 + 0.1)
    # 32 bits of both factors, as 16 x 64.
    assert mac_energy(16, 64) * 1e6 == pytest.approx(3.1 + 0.1, rel=0.04)
    assert mac_energy(32, 32) * 1e6 == mac_energy(8, 32) * 1e6 == pytest.approx(3.7 + 0.9)
    assert read_energy(64) * 1e6 == pytest.approx(64 * DRAM)


def test_energy_is_that_of_products_and_of_reading_weights_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 10, bias=False))
    x = torch.randn(5, 3, 6, 6)
    recording = record(net, lambda: net(x), samples=5)
    conv, linear = 4 * 16 * 27, 640
    floating = plan_cost(net, {}, recording).energy
    assert floating == pytest.approx(((conv + linear) * 4.6 + (4 * 27 + 640) * 32 * DRAM) * 1e-6)
    found = plan_cost(net, {"0": plan("int4", "uint8"), "3": plan("int8", None)}, recording).energy
    # One scale of 32 bits each; the linear layer's input is float, and so is its product.
    reads = (4 * 27 * 4 + 32) + (640 * 8 + 32)
    assert found == pytest.approx((conv * (0.2 * 32 / 64 + 0.1) + linear * 4.6 + reads * DRAM) * 1e-6)
    assert plan_cost(net, {}).energy is None
    # A prepared model costs what its plan says.
    lq_plugin.prepare(
        net, {"rules": [{"match": "0", "weight": "int4", "input": "uint8"}, {"match": "3", "weight": "int8"}]}
    )
    assert cost(net, recording).energy == pytest.approx(found)


def test_products_outside_of_layers_count_and_a_tied_weight_is_read_once() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.b(x).transpose(1, 2)

    net, x = Scores(), torch.randn(2, 5, 8)
    recording = record(net, lambda: net(x), samples=2)
    products, scores = 2 * 5 * 64, 5 * 5 * 8
    assert plan_cost(net, {}, recording).energy == pytest.approx(((products + scores) * 4.6 + 64 * 32 * DRAM) * 1e-6)
    name = next(name for name in recording.sample_macs if "matmul" in name)
    eight = plan_cost(net, {name: plan(None, "int8")}, recording).energy
    assert eight == pytest.approx((products * 4.6 + scores * 0.3 + 64 * 32 * DRAM) * 1e-6)


def test_parameters_outside_of_quantizable_layers_are_read_as_well() -> None:
    net = nn.Sequential(nn.Linear(8, 4, bias=True), nn.LayerNorm(4))
    x = torch.randn(2, 8)
    recording = record(net, lambda: net(x), samples=2)
    assert plan_cost(net, {}, recording).energy == pytest.approx((32 * 4.6 + (32 + 4 + 8) * 32 * DRAM) * 1e-6)
