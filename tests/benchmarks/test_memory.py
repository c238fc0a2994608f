"""Peaks of memory next to a model: what packing promises of every format."""

import pytest

from benchmarks.memory import FORMATS, LIMITS, in_a_process


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*FORMATS, "ttq", "twn:exact"])
def test_packing_takes_little_more_than_the_largest_layer(spec):
    assert in_a_process({"kind": "pack", "spec": spec, "size": 1024}, None)["layers"] < LIMITS["pack"]
