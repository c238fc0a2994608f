"""Calibration without a Trainer."""

import torch
from torch import nn

import lq_plugin


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
