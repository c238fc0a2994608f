"""Data and weights that no range comes from: each a clear error that names the place; the smallest batches work."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, CalibrationError, PlanError, calibrate, prepare
from lq_plugin.model import quantizers
from tests.callbacks.conftest import Module

BAD = [float("nan"), float("inf"), float("-inf")]
PLANS = ["w4a8", "w4 mse a8 mse", "w4 lsq a4 lsq", "w8 percentile:99 a8 percentile:99.9", "mx6 / mx9"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*DataLoader returned 0 length"),
    pytest.mark.filterwarnings("ignore:Total length of"),
]


def assert_same(module, before):
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("plan", PLANS[:4])
def test_bad_calibration_data_names_the_layer(plan, value, trainer, module, data):
    data.x[3, 0, 2, 2] = value
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CalibrationError, match=r"net\.conv\.input.*(NaN|Inf|finite)"):
        trainer(PTQ(plan, phases=["calibrate"])).validate(module, datamodule=data, verbose=False)
    with pytest.raises(CalibrationError, match=r"net\.conv\.input.*(NaN|Inf|finite)"):
        trainer(QAT(plan)).fit(module, datamodule=data)
    assert_same(module, before)


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("plan", [*PLANS, "w4", "bwn", "twn", "kmeans2", "int4 group3 ragged", "a8"])
def test_bad_weights_name_the_layer(plan, value, module, data):
    with torch.no_grad():
        module.net.conv2.weight[1, 2, 0, 0] = value
    prepare(module, plan)
    with pytest.raises(CalibrationError, match=r"net\.conv2\.weight.*(NaN|Inf)"):
        calibrate(module, [data.x[:16]])


@pytest.mark.parametrize("plan", PLANS[:3])
def test_batches_of_one(plan, trainer, data):
    data.batch_size = 1
    data.x, data.y = data.x[60:68], data.y[60:68]
    L.seed_everything(0, verbose=False)
    module = Module()
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=1)
    trainer(QAT(plan), max_epochs=1).fit(module, loader, loader)
    assert all(q.is_calibrated for q in quantizers(module) if q.needs_calibration)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    torch.testing.assert_close(module.eval()(data.x[:1]), module(data.x[:2])[:1])
    fresh = Module()
    trainer(PTQ(plan, dataloader=loader)).validate(fresh, loader, verbose=False)
    assert all(q.is_calibrated for q in quantizers(fresh) if q.needs_calibration)


@pytest.mark.parametrize("plan", ["w4a8", "w4"])
def test_empty_loaders_are_an_error_before_any_work(plan, trainer, module, data):
    empty = DataLoader(TensorDataset(data.x[:0], data.y[:0]), batch_size=4)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CalibrationError, match="no calibration data: the loader gave 0 batches"):
        trainer(PTQ(plan, dataloader=empty, recalibrate=True)).validate(module, datamodule=data, verbose=False)
    assert_same(module, before)


def test_a_constant_and_an_all_zero_input_have_a_range(module, data):
    """A range of no width is a scale that divides nothing by zero."""
    for value in (0.0, 3.0, -2.0, 1e-30, 1e30):
        net = nn.Sequential(nn.Linear(4, 3))
        prepare(net, "w8 a8 mse")
        x = torch.full((5, 4), value)
        calibrate(net, [x])
        y = net.eval()(x)
        assert torch.isfinite(y).all()
        torch.testing.assert_close(net[0].quantized_input(x), x, rtol=1e-2, atol=1e-30)


def test_nothing_to_quantize_names_what_is_there():
    for net, reason in (
        (nn.Sequential(nn.BatchNorm1d(3)), r"0 \(BatchNorm1d\): normalization"),
        (nn.Sequential(nn.ReLU()), "no layers with weights"),
        (nn.Sequential(nn.PReLU()), r"0 \(PReLU\): no quantized form"),
    ):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(
            PlanError, match=f"nothing to quantize in Sequential, the plan matches no layer: .*{reason}"
        ):
            prepare(net, "w8a8")
        assert_same(net, before)


def test_a_plan_for_another_model_changes_nothing(trainer, module, data):
    before = copy.deepcopy(module.state_dict())
    rules = [
        {"match": "*", "weight": "int4"},
        {"match": "net.layer1.*", "weight": "int8"},
        {"match": "net.con2", "input": "int8"},
    ]
    with pytest.raises(PlanError, match=r"(?s)2 faults.*net\.layer1.*Did you mean 'net\.conv2'"):
        trainer(QAT({"rules": rules})).fit(module, datamodule=data)
    assert not quantizers(module)
    assert "configure_model" not in module.__dict__
    assert_same(module, before)


class Sums(L.LightningModule):
    """Its loss is a sum, so that an empty batch has the gradient 0."""

    def __init__(self):
        super().__init__()
        L.seed_everything(0, verbose=False)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 4))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.001)


@pytest.mark.parametrize("plan", [*PLANS, "bwn / sign", "nvfp4 / nvfp4", "int4 group4:4 ragged / int8 group4:4 ragged"])
@pytest.mark.parametrize("where", [0, 2])
def test_an_empty_batch_in_training_changes_nothing(plan, where, trainer):
    batches = [torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with_empty = [*batches[:where], batches[0][:0], *batches[where:]]
    states = []
    for given in (batches, with_empty):
        module = Sums()
        trainer(QAT(plan, init_batches=where), max_epochs=1).fit(module, DataLoader(given, batch_size=None))
        states.append(module.state_dict())
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items() if not key.endswith("draws"))
