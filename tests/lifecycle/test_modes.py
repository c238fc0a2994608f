"""Modules that a Trainer finds in an unusual state: in evaluation mode, scripted or traced."""

import lightning as L
import pytest
import torch
from torch import nn

from lq_plugin import QAT, CalibrationError, PlanError, prepare
from lq_plugin.model.prepare import quantized_layers
from tests.callbacks.conftest import Module

# Lightning's advice on modules in evaluation mode.
pytestmark = [pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training")]


@pytest.mark.parametrize("plan", ["w4a8", "w4 lsq a4 lsq"])
def test_trained_in_evaluation_mode(plan, trainer, data):
    """Lightning leaves it there (frozen batch norms): it trains quantized, with the ranges found first; learned ones
    are trained."""
    L.seed_everything(0, verbose=False)
    module, states = Module().eval(), []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            assert not any(m.training for m in pl_module.net.modules())
            states.append({key: value.detach().clone() for key, value in pl_module.state_dict().items()})
            for _, layer in quantized_layers(pl_module):
                assert len(layer.quantized_weight()[0].unique()) <= 16

    trainer(QAT(plan), Look(), num_sanity_val_steps=0, limit_val_batches=0).fit(module, datamodule=data)
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, states[0][key])}
    assert {"net.conv.weight", "net.conv2.weight", "net.fc.weight"} <= moved
    learned = {key for key in moved if "quantizer" in key}
    assert all(key.endswith(("scale", "zero_point")) for key in learned)
    assert bool(learned) == ("lsq" in plan)


def test_in_evaluation_mode_without_first_ranges_it_is_an_error(trainer, data):
    with pytest.raises(CalibrationError, match=r"net\.conv\.input .* has no range yet"):
        trainer(QAT("w4a8", init_batches=0), num_sanity_val_steps=0).fit(Module().eval(), datamodule=data)


@pytest.mark.filterwarnings("ignore:`torch.jit.* is (deprecated|not supported)")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(1, 4))], ids=["script", "trace"]
)
def test_scripted_modules_stay_float_with_the_reason(make):
    net = nn.Sequential(nn.Linear(4, 4), make(nn.Linear(4, 4)))
    ledger = prepare(net, "w4a8")
    assert [entry.name for entry in ledger.quantized] == ["0"]
    assert [(entry.name, entry.reason) for entry in ledger.left_float] == [
        ("1", "no quantized form of this layer type")
    ]
    assert ledger.weight_coverage == 0.5
    with pytest.raises(PlanError, match=r"nothing to quantize in .*no quantized form of this layer type"):
        prepare(make(nn.Linear(4, 4)), "w4a8")
