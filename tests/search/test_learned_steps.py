"""LIMPQ's indicators: the steps that quantizers learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QuantizationError
from lq_plugin.search import Evaluator
from lq_plugin.search.sensitivity.learned_steps import WEIGHTS
from lq_plugin.search.sensitivity.measure import measure_sensitivity

from .conftest import CPU

BITS = [2, 3, 4]


class Copies(LightningModule):
    """Two layers; the loss is the squared error of the first one's weight alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64, bias=False), nn.Linear(64, 4, bias=False)
        nn.init.normal_(self.first.weight)
        self.target = self.first.weight.detach().clone()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.first(batch[0])
        self.second(y)
        return F.mse_loss(y, batch[0] @ self.target.T)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.eye(32)), 32)

    train_dataloader = val_dataloader


def squared_error(weight: np.ndarray, step: float, bits: int) -> float:
    levels = np.clip(np.round(weight / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(((levels * step - weight) ** 2).sum())


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_steps_are_learned_to_where_the_loss_is_least(ranges: str) -> None:
    module = Copies()
    with Evaluator(module, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate({"weight": {"bit_widths": BITS, "granularities": ["per_tensor"], "ranges": [ranges]}})
        before = {name: (p.clone(), p.requires_grad) for name, p in module.named_parameters()}
        values = measure_sensitivity(evaluator, "learned_step", 1).values
        weight = module.first.weight.detach().double().numpy()
        for bits in BITS:
            step = next(v for c, v in values["first.weight"].items() if c.startswith(f"int{bits}")) / WEIGHTS
            best = min(squared_error(weight, s, bits) for s in np.linspace(0.02, 2, 1000))
            assert best <= squared_error(weight, step, bits) < 1.1 * best
        # What the loss says nothing of stays where it was calibrated.
        evaluator.apply(evaluator.layer_plans({"rules": [{"match": "second", "weight": f"int2 per_tensor {ranges}"}]}))
        calibrated = float(module.second.weight_quantizer.levels(module.second.weight).step)
        found = next(v for c, v in values["second.weight"].items() if c.startswith("int2"))
        assert found / WEIGHTS == pytest.approx(calibrated, rel=1e-5)
        evaluator.apply({})
        assert {name: p.requires_grad for name, p in module.named_parameters()} == {
            name: wanted for name, (_, wanted) in before.items()
        }
        assert all(torch.equal(p, before[name][0]) and p.grad is None for name, p in module.named_parameters())


def test_inputs_choices_of_one_width_and_float() -> None:
    space: dict[str, Any] = {
        "weight": ["float", "int2", "int2 group16", "int4", "int4 group16"],
        "input": {"bit_widths": [3, 8], "ranges": ["minmax"], "signed": False, "affine": True},
    }
    with Evaluator(Copies(), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(space)
        values = measure_sensitivity(evaluator, "learned_step", 1).values
    row = values["first.weight"]
    assert row["float"] == 0
    assert row["int2"] == row["int2 group16"] > row["int4"] == row["int4 group16"] > 0
    for name in ("first.input", "second.input"):
        coarse, fine = (next(v for c, v in values[name].items() if c.startswith(f"uint{bits}")) for bits in (3, 8))
        assert coarse > fine > 0


def test_formats_without_a_step_are_refused() -> None:
    with Evaluator(Copies(), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate({"weight": ["int4", "mx6"]})
        with pytest.raises(QuantizationError, match="first.weight: 'mx6' has no step"):
            measure_sensitivity(evaluator, "learned_step", 1)


class Constant(Copies):
    """Its loss does not depend on what its layers make."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).detach()


def test_a_loss_that_depends_on_nothing_is_an_error() -> None:
    with Evaluator(Constant(), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate({"weight": {"bit_widths": BITS}})
        with pytest.raises(QuantizationError, match="does not depend on any of the tensors"):
            measure_sensitivity(evaluator, "learned_step", 1)
