"""Modules that a Trainer finds in an unusual state (in evaluation mode, scripted, with another forward, under another
default dtype), inputs of an unusual kind, and layers that come in while it trains."""

import functools

import lightning as L
import pytest
import torch
from torch import nn

from lq_plugin import QAT, CalibrationError, PlanError, calibrate, prepare
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


class Patched(Module):
    """As accelerate does it for `device_map`: the layer's forward is a function around its float method."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            layer = self.net.get_submodule(name)
            layer.forward = functools.partial(lambda forward, *args: forward(*args), layer.forward)


def test_a_layer_whose_forward_was_replaced_is_float_with_the_reason(trainer, data):
    module, callback = Patched("fc"), QAT("w4a8")
    trainer(callback).fit(module, datamodule=data)
    assert "its forward is replaced" in callback.ledger["net.fc"].reason
    assert callback.ledger.compute_coverage < 1.0
    with pytest.raises(PlanError, match=r"nothing to quantize(?s:.*)its forward is replaced"):
        trainer(QAT("w4a8")).fit(Patched("conv", "conv2", "fc"), datamodule=data)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_is_float_with_the_reason():
    ledger = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0)), "w4 lsq a8 lsq")
    assert ledger["1"].reason == "its weight has no elements"


def test_nested_inputs_are_quantized_by_their_values():
    torch.manual_seed(0)
    net, parts = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), [torch.randn(3, 4), torch.randn(5, 4)]
    prepare(net, "w4 lsq a8 lsq")
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    calibrate(net, [nested])
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prepare(other, "w4 lsq a8 lsq")
    other.load_state_dict(net.state_dict())
    calibrate(other, [torch.cat(parts)])
    outputs = net.train()(nested).values(), other.train()(torch.cat(parts))
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_another_default_dtype(trainer, data):
    torch.set_default_dtype(torch.float64)
    try:
        module = Module()
        trainer(QAT("w4a8"), precision="64-true").fit(module, datamodule=data)
        assert module.net.fc.input_quantizer.running_max.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_layers_that_come_in_while_training_are_named(trainer, data):
    class Grows(Module):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net.fc = nn.Linear(self.net.fc.in_features, self.net.fc.out_features)

    with pytest.warns(UserWarning, match=r"net\.fc came in after the quantizers and stays float") as caught:
        trainer(QAT("w4a8"), max_epochs=3).fit(Grows(), datamodule=data)
    assert len([each for each in caught if "came in" in str(each.message)]) == 1
