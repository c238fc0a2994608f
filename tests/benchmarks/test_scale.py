"""The models of `benchmarks.scale`, and one run of all steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import scale
from benchmarks.scale_models import Size, decibels, make, sequences

pytest.importorskip("transformers", reason="its models are transformers'")
SMALL = Size(layers=1, width=128, hidden=256, heads=4, vocabulary=100, sequences=2, tokens=16)


def test_models_and_tokens_are_those_of_the_size():
    model = make(SMALL)
    layer = 4 * 128 * 128 + 3 * 128 * 256 + 2 * 128
    assert sum(p.numel() for p in model.parameters()) == 2 * 100 * 128 + layer + 128
    assert [batch.shape for batch in sequences(SMALL)] == [(1, 16)] * 2
    assert not torch.equal(sequences(SMALL)[0], sequences(SMALL, 1)[0])
    again = make(SMALL)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_decibels():
    x, y = torch.randn(2, 50), torch.randn(2, 50)
    wanted = 10 * np.log10((x.numpy() ** 2).sum() / ((x - y).numpy() ** 2).sum())
    assert decibels(list(x), list(y)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_every_step_is_measured(monkeypatch):
    monkeypatch.setitem(scale.SIZES, "small", SMALL)
    found = scale.run("small", "int4 group128", 1, ["prepare", "calibrate", "gptq", "pack", "load"])
    assert list(found["steps"]) == ["forward", "prepare", "calibrate", "gptq", "pack", "load"]
    assert found["steps"]["gptq"]["decibels"] > found["steps"]["calibrate"]["decibels"]
    assert all(row["seconds"] > 0 for row in found["steps"].values())
