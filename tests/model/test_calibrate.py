"""Calibration without a Trainer."""

import pytest
import torch
from torch import nn

import lq_plugin
from lq_plugin import calibrate, prepare


def test_a_layer_that_no_batch_reaches_is_named(caplog):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    for plan, named in (("w8a8", True), ("mx6 / mx6", False)):
        model = Spare()
        lq_plugin.prepare(model, plan)
        caplog.clear()
        with caplog.at_level("WARNING", "lq_plugin.model.calibrate"):
            lq_plugin.calibrate(model, [torch.randn(8, 4)])
        assert ("no batch reached spare.input; what has no range stays float" in caplog.text) == named


@pytest.mark.parametrize(
    ("plan", "share"),
    [
        (
            "int8 / uint8",
            "0.input: 50.8% of its values are negative",
        ),
        ("int8 / uint4 group8:4", "0.input: 4"),
        ("uint8 per_channel", "0.weight: "),
        ("int8 / int1", "0.input: "),
        ("int8 / uint8 affine", None),
        ("w8a8", None),
        ("int8 / int8 percentile:90", None),
    ],
)
def test_values_on_a_side_without_levels_are_said(plan, share, caplog):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16))
    prepare(net, plan)
    calibrate(net, [torch.randn(64, 16) for _ in range(4)])
    if share is None:
        assert not caplog.records
    else:
        assert share in caplog.text
        assert "no levels there" in caplog.text


def test_the_share_without_levels_leaves_out_what_rounds_to_zero(caplog):
    """One per cent is the limit; values within half a step of zero are represented."""
    x = torch.rand(4, 1000) + 0.5
    x[:, :300] = -0.001
    x[0, 300:330] = -1.0  # 0.75 %
    net = nn.Sequential(nn.Linear(1000, 2))
    prepare(net, "int8 / uint8")
    calibrate(net, [x])
    assert not caplog.records
    x[1, 300:330] = -1.0
    calibrate(net, [x])
    assert "0.input: 1.5% of its values are negative" in caplog.text
