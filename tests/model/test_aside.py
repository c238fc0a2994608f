"""Metrics with networks, frozen loss networks and frozen teachers are no part of what a plan quantizes."""

from __future__ import annotations

import copy

import pytest
import torch
import torchmetrics
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lq_plugin
from lq_plugin import PTQ
from lq_plugin.errors import PlanError
from lq_plugin.model.aside import set_aside
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.report.explain import explain


class Perceptual(torchmetrics.Metric):
    """A distance in the features of a network, as LPIPS and FID measure it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, a: Tensor, b: Tensor) -> None:
        features = (self.net(a) - self.net(b)).flatten(1)
        self.total += (features @ features.T).diagonal().mean()

    def compute(self) -> Tensor:
        return self.total


class Restoring(LightningModule):
    def __init__(self, called: bool = True) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
        self.lpips = Perceptual()
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        y = self(nn.functional.avg_pool2d(x, 2))
        if self.called:
            self.lpips(y, x)
        else:
            self.lpips.update(y, x)
        self.log("lpips", self.lpips)


def images() -> DataLoader:
    return DataLoader(torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)), batch_size=4)


@pytest.mark.parametrize("called", [True, False], ids=["metric(x)", "metric.update(x)"])
def test_a_metric_measures_the_quantized_model_in_float(called: bool) -> None:
    torch.manual_seed(0)
    model = Restoring(called)
    network = copy.deepcopy(model.lpips)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    ptq = PTQ("int2 per_channel / uint8 affine", dataloader=images(), min_coverage=1.0)
    (logged,) = Trainer(callbacks=[ptq], **quiet).validate(model, images(), verbose=False)
    with torch.no_grad():
        expected = [network(model(nn.functional.avg_pool2d(x, 2)), x) for x in images()]
    assert logged["lpips"] == pytest.approx(torch.stack(expected).sum().item(), rel=1e-4)
    assert [entry.name for entry in ptq.ledger] == ["up.0", "lpips"]
    assert ptq.ledger["lpips"].reason == "a metric, no part of the model; a rule that names it quantizes it: 'lpips.*'"
    assert ptq.recording is not None
    assert ptq.recording.sample_macs == {"up.0": 12 * 36 * 27, "up.1": 0}
    priced = cost(model, ptq.recording)
    assert priced.macs == 12 * 36 * 27
    assert priced.effective_bits == (12 * 27 * 2 + 12 * 32 + 12 * 32) / (12 * 27 + 12)


def test_a_rule_that_names_it_quantizes_it() -> None:
    for pattern in ("lpips.net.*", r"re:lpips\.net\.[02]", "*lpips*"):
        model = Restoring()
        ledger = lq_plugin.prepare(
            model, {"rules": [{"match": "up.*", "weight": "int8"}, {"match": pattern, "weight": "int4"}]}
        )
        assert [entry.name for entry in ledger.quantized] == ["up.0", "lpips.net.0", "lpips.net.2"]
        # From then on it is a part of the model, for whoever looks at it.
        assert [row.weight_bits for row in cost(model)] == [8, 4, 4]
        lq_plugin.remove(model)
        assert set_aside(model) == {"lpips": "a metric"}


def test_rules_that_keep_it_float_ask_for_nothing() -> None:
    rules = [{"match": "*", "weight": "int4"}, {"match": "lpips.*", "weight": "float", "input": "float"}]
    model = Restoring()
    assert [entry.name for entry in explain({"rules": rules}, model).ledger.quantized] == ["up.0"]
    assert [entry.name for entry in lq_plugin.prepare(model, {"rules": rules}).quantized] == ["up.0"]


def test_patterns_that_match_nothing_else_are_refused_with_the_reason() -> None:
    model = nn.ModuleDict({"net": nn.Linear(4, 4), "lpips": Perceptual()})
    with pytest.raises(PlanError, match=r"'type:Conv2d' matches no layer"):
        lq_plugin.prepare(
            model, {"rules": [{"match": "*", "weight": "int8"}, {"match": "type:Conv2d", "weight": "int4"}]}
        )
    with pytest.raises(
        PlanError, match=r"nothing to quantize(.|\n)*lpips \(Perceptual\): a metric, no part of the model"
    ):
        lq_plugin.prepare(nn.ModuleDict({"lpips": Perceptual()}), "w4")
    # A network that somebody quantizes for itself is a model, whatever class it has.
    assert len(lq_plugin.prepare(Perceptual(), "w4").quantized) == 2


class FrozenLoss(nn.modules.loss._Loss):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.features(x) - self.features(y)).square().mean()


def test_frozen_teachers_and_loss_networks_are_set_aside_and_frozen_backbones_are_not() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)
            self.teacher, self.criterion = nn.Linear(4, 2).requires_grad_(False), FrozenLoss()

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.backbone(x))
            return y - self.teacher(x) + self.criterion(x, x + 1)

    model = Model()
    assert set_aside(model) == {"teacher": "a frozen teacher", "criterion": "a frozen loss network"}
    recording = record(model, lambda: model(torch.randn(3, 4)))
    ledger = lq_plugin.prepare(model, "w4a8")
    ledger.add_recording(recording)
    assert [entry.name for entry in ledger.quantized] == ["backbone", "head"]
    assert (ledger.weight_coverage, ledger.compute_coverage, recording.total_macs) == (1.0, 1.0, 3 * (16 + 8))
    assert recording.uncalled == ()
    # Trained, or frozen with everything else, they are layers as any other.
    lq_plugin.remove(model)
    assert set_aside(model.requires_grad_(False)) == set_aside(model.requires_grad_(True)) == {}
