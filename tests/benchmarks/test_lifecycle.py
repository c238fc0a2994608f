"""The audit of `benchmarks.lifecycle`: its models, their counts by hand, and one whole row."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import lifecycle
from benchmarks.lifecycle_models import CASES
from lq_plugin.model import float_forward, record

BY_HAND = [case for case in CASES if case.macs is not None]


def test_sixty_models_and_ten_counts_by_hand():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60
    assert len(BY_HAND) >= 10


@pytest.mark.parametrize("case", [case for case in BY_HAND if case.package is None], ids=lambda case: case.name)
def test_counts_by_hand(case):
    module, ledger = lifecycle.student(case, quantized=True)
    inputs = lifecycle.inputs_of(case)
    with torch.no_grad(), float_forward(module):
        ledger.add_recording(record(module, lambda: module(*inputs)))
    assert lifecycle.counted(case, ledger)
    if case.products:
        assert lifecycle.with_products(case, inputs) == 1


@pytest.mark.slow
def test_a_whole_row(tmp_path):
    out = tmp_path / "out.json"
    lifecycle.main(["--models", "MultiheadAttention", "--json", str(out)])
    (row,) = json.loads(out.read_text())["results"]
    bit_equal = ("counted", "disabled_bit_equal", "removed_bit_equal", "packed_bit_equal", "checkpoint")
    assert [row[key] for key in bit_equal] == [True] * 5
    assert (row["onnx"], row["compile"], row["error"]) == ("verified", "ok", None)
    assert (row["compute_coverage"] < 0.9, row["with_products"]) == (True, 1)
    assert row["sqnr_db"] > 30
