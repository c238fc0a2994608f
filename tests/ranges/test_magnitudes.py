"""Moments of the magnitudes that count, against numpy with masked arrays."""

import numpy as np
import pytest
import torch

from lq_plugin.intent.spec import QuantSpec
from lq_plugin.ranges import Sample
from lq_plugin.ranges.magnitudes import fold


def weights(zeros: bool) -> torch.Tensor:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    x[1], x[2] = x[1].abs() + 1e-3, -x[2].abs() - 1e-3
    return x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 0.0) if zeros else x


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", ["int4", "uint4", "int1", "uint4 affine"])
def test_moments_of_what_counts(zeros, masked, spec):
    x, grid = weights(zeros), QuantSpec.parse(spec).grid
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < (0.8 if masked else 2.0)
    folded = fold(Sample.from_tensor(x, mask if masked else None), grid)
    for row in range(4):
        values = x[row][mask[row]].double().numpy()
        around_mean = grid.affine and values.min() < 0 < values.max()
        if around_mean:
            y = np.abs(values - values.mean())
        else:
            y = {"uint4": np.maximum(values, 0), "int1": np.maximum(-values, 0)}.get(spec, np.abs(values))
            y = y[y != 0]
        assert folded.total()[row].item() == len(y)
        assert folded.mean()[row].item() == pytest.approx(y.mean() if len(y) else 0.0, rel=1e-6)
        assert folded.root_mean_square()[row].item() == pytest.approx(
            np.sqrt((y**2).mean()) if len(y) else 0.0, rel=1e-6
        )


def test_selected_rows_are_those_of_the_whole():
    folded = fold(Sample.from_tensor(weights(zeros=True)), QuantSpec.parse("int4").grid)
    rows = torch.tensor([True, False, True, False])
    some = folded.select(rows)
    assert torch.equal(some.mean(), folded.mean()[rows])
    assert torch.equal(some.sample.minimum, folded.sample.minimum[rows])
    assert folded.select(torch.ones(4, dtype=torch.bool)) is folded
