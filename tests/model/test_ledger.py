"""Coverage of weights and of compute against shares counted by hand, and what `min_coverage` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq_plugin
from lq_plugin import QuantPlan, Rule
from lq_plugin.errors import CoverageError
from lq_plugin.model.graph.record import record
from lq_plugin.model.ledger import Ledger


class Experts(nn.Module):
    """A mixture of experts as released models have it: weights of all experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(8, 16), nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.grouped_mm(self.first(x), self.experts, offs=torch.tensor([2, 4, 6, 8], dtype=torch.int32))


class Bag(nn.Module):
    """A table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(30, 8))

    def forward(self, words: Tensor) -> Tensor:
        return F.embedding_bag(words, self.weight)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = Bag(), nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.bag(words))


def ledger_of(model: nn.Module, plan: Any, x: Tensor) -> Ledger:
    recording = record(model.eval(), lambda: model(x))
    ledger = lq_plugin.prepare(model, plan)
    assert ledger.compute_coverage is None
    ledger.add_recording(recording)
    return ledger


def test_experts_count_in_both_shares() -> None:
    ledger = ledger_of(Experts(), "w8a8", torch.randn(8, 8))
    assert (ledger.weight_coverage, ledger.compute_coverage) == (1.0, 1.0)
    rules = [Rule("*", weight="int8", input="int8"), Rule("experts", weight="float", input="float")]
    ledger = ledger_of(Experts(), QuantPlan(rules), torch.randn(8, 8))
    assert ledger.weight_coverage == 128 / (128 + 4 * 128)
    assert ledger.compute_coverage == 0.5
    assert ledger["experts"].macs == 128, "each of 8 rows meets one expert"
    with pytest.raises(
        CoverageError,
        match=r"weights coverage is 20\.0%(.|\n)*- experts \(Experts\)(.|\n)*compute coverage is 50\.0%(.|\n)*experts",
    ):
        ledger.require(0.85)


def test_a_table_without_quantized_form_counts_in_the_weights() -> None:
    ledger = ledger_of(Words(), "w8a8", torch.randint(0, 30, (5, 3)))
    assert (ledger.weight_coverage, ledger.compute_coverage) == (32 / (240 + 32), 1.0)
    with pytest.raises(CoverageError, match=r"bag \(Bag\): no quantized form of this layer type"):
        ledger.require(0.9)
    ledger.require({"compute": 1.0})


def test_a_product_with_a_float_input_is_not_covered() -> None:
    ledger = ledger_of(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "int8 per_channel", torch.randn(3, 4)
    )
    assert (ledger.weight_coverage, ledger.compute_coverage) == (1.0, 0.0)
    assert ledger.summary() == "2 quantized, 0 float; coverage 100.0% of weights, 0.0% of MACs"
    ledger.require({"weights": 1.0})
    with pytest.raises(
        CoverageError,
        match=r"compute coverage is 0\.0%.*50\.0%(.|\n)*0 \(Linear\): the plan leaves its input float(.|\n)*sets both",
    ):
        ledger.require(0.5)


def test_bounds_are_those_that_are_given() -> None:
    plan = {"rules": [{"match": "*", "weight": "int8"}, {"match": "0", "input": "uint8 affine"}]}
    ledger = ledger_of(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), plan, torch.randn(3, 4))
    assert ledger.compute_coverage == 32 / 48
    for passing in (None, 0.6, {"weights": 1.0, "compute": 2 / 3}, {"compute": 0.0}, {}):
        ledger.require(passing)
    for failing in (0.7, {"compute": 0.7}, {"weights": 0.1, "compute": 1}):
        with pytest.raises(CoverageError, match=r"compute coverage is 66\.7%"):
            ledger.require(failing)
    with pytest.raises(CoverageError, match="not known before a batch is recorded"):
        lq_plugin.prepare(nn.Sequential(nn.Linear(4, 4)), "w8a8").require({"compute": 0.5})


class Distances(nn.Module):
    """Hands a table's weight to a norm, as DeBERTa does with its relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(5, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.norm(self.table.weight).mean(0))


def test_a_weight_that_is_handed_to_another_module_is_float() -> None:
    ledger = ledger_of(Distances(), "w8a8", torch.randn(3, 8))
    assert "norm reads its weight, in float" in str(ledger["table"].reason)
    assert ledger.weight_coverage == 32 / (32 + 40)


def test_a_reverse_direction_reads_the_input_that_the_forward_one_quantizes() -> None:
    """It has no input quantizer of its own, which would look like a float input in the table."""
    gru = nn.GRU(8, 6, bidirectional=True)
    reasons = {entry.name: entry.reason for entry in lq_plugin.prepare(gru, "w4a8")}
    assert reasons["weight_ih_l0_reverse"] == "reads the input of weight_ih_l0, quantized there"
    assert reasons["weight_ih_l0"] is None
    left_out = lq_plugin.prepare(nn.GRU(8, 6, bidirectional=True), "w4")
    assert next(entry.reason for entry in left_out if entry.name == "weight_ih_l0_reverse") is None
