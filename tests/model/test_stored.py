"""Bytes by part, and the memory of activations, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lq_plugin
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.model.graph.record import record
from lq_plugin.model.graph.recording import Call, Recording, Source
from lq_plugin.model.measure.activation_memory import activation_bytes
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.stored import stored_bytes


@pytest.mark.parametrize(
    ("weight", "codes", "scales"),
    [
        ("int4 per_channel", 32 * 64 // 2, 32 * 4),
        ("int3 per_tensor", 32 * 64 * 3 // 8, 4),
        ("int4 group16", 32 * 64 // 2, 32 * 4 * 4),
        ("uint4 affine group16", 32 * 64 // 2, 32 * 4 * 4 + 32 * 4 // 2),
        # One codebook of 4 floats; blocks of 32 share an exponent of 8 bits.
        ("kmeans2", 32 * 64 // 4, 4 * 4),
        ("mxfp4", 32 * 64 // 2, 32 * 2),
    ],
)
def test_weights_and_scales(weight: str, codes: int, scales: int) -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    lq_plugin.prepare(net, {"rules": [{"match": "0", "weight": weight}]})
    parts = stored_bytes(net, cost(net))
    assert (parts["weights"], parts["scales"]) == (codes, scales)
    assert parts["float"] == 4 * (32 + 32 * 8 + 8)
    assert sum(parts.values()) == cost(net).bytes


def test_tied_weights_are_stored_once_and_everything_adds_up() -> None:
    net = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 10, bias=False), nn.BatchNorm1d(10))
    net[1].weight = net[0].weight
    lq_plugin.prepare(net, {"rules": [{"match": "*", "weight": "int8 per_channel"}, {"match": "1", "input": "uint8"}]})
    parts = stored_bytes(net, cost(net))
    assert (parts["weights"], parts["scales"]) == (160, 40)
    assert parts["ranges"] > 0
    assert sum(parts.values()) == cost(net).bytes
    flat = nn.Linear(4, 4)
    assert stored_bytes(flat, cost(flat)) == {"weights": 0, "scales": 0, "ranges": 0, "float": 80, "table": 0}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        z = self.b(y) + y
        return self.head(z.flatten(1))


def test_the_fullest_moment_of_a_residual_block() -> None:
    net, x = Residual(), torch.randn(6, 3, 4, 4)
    recording = record(net, lambda: net(x), samples=6)
    size = 8 * 4 * 4
    # While the sum is made: its two operands and itself, 4 bytes each; the ReLU works in place.
    assert activation_bytes(recording) == 3 * size * 4
    eight = LayerPlan(input=QuantSpec.parse("uint8"))
    # The sum reads y in float, so that 8 bits of b's input save nothing of y; those of the head save of the sum.
    assert activation_bytes(recording, {"b": eight}) == 3 * size * 4
    assert activation_bytes(recording, {"b": eight, "head": eight}) == 2 * size * 4 + size


def test_the_fullest_moment_of_a_dense_block_and_of_a_long_chain() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3 * index + 5, 3) for index in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.cat([x, layer(x)], dim=1)
            return x

    net, x = Dense(), torch.randn(4, 5)
    recording = record(net, lambda: net(x), samples=4)
    # The last one: what came before it (20 numbers), the layer's three, and both together.
    assert activation_bytes(recording) == 4 * (20 + 3 + 23)
    calls = tuple(
        Call(now, "other", f"mul_{now}", "mul", 0, (Source((8,), now - 1 if now else None, 0, True),), ((8,),))
        for now in range(100_000)
    )
    # Each reads the one before it: looking through all tensors at each call would take half an hour.
    assert activation_bytes(Recording(calls, samples=1)) == 2 * 8 * 4
