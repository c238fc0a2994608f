"""Copies of the network whose state is averaged or loaded in place compute in the phase and stage that their state
says."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging

from lq_plugin import QAT
from lq_plugin.model.prepare import quantizers
from tests.callbacks.conftest import Module

STAGES = {
    "rules": [
        {"match": "*", "weight": "int8 per_channel", "input": "uint8 affine ema"},
        {"match": "*", "weight": "int2 per_channel mse", "start": "epoch 1"},
    ]
}
KINDS = {
    "activations_start": (("w8a4",), {"schedule": {"activations_start": "epoch 1"}}),
    "stages": ((STAGES,), {}),
    "first ranges from training": (("w8a8",), {"init_batches": 0}),
}


class Copy(Callback):
    """Follows at once, so that it must compute what the model does."""

    @torch.no_grad()
    def on_train_start(self, trainer, pl_module):
        self.net = copy.deepcopy(pl_module.net).eval()

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *rest):
        for mine, other in zip(self.net.state_dict().values(), pl_module.net.state_dict().values(), strict=True):
            mine.copy_(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_is_averaged_in_place(kind, trainer, data):
    torch.manual_seed(0)
    module, follower = Module(), Copy()
    plan, options = KINDS[kind]
    trainer(QAT(*plan, **options), follower, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert torch.equal(follower.net(data.x), module.eval()(data.x))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_average_of_an_earlier_phase_is_validated_in_it(first, trainer, data):
    """Averages that lag behind are swapped in and out by Lightning through `.data`."""
    seen = []

    class Lagging(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx == 3  # the last batch before activations start

    class Look(Module):
        def on_validation_start(self):
            assert len([q.is_enabled for q in quantizers(self)]) == 6  # as a monitor asks

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            chosen = [q for q in quantizers(self) if q.name.endswith("input")]
            assert [q.is_enabled for q in chosen] == [bool(q.enabled) for q in chosen]
            seen.append(chosen[0].is_enabled)

        def on_train_batch_end(self, *args):
            trained.append(quantizers(self)[1].is_enabled)

    trained = []
    torch.manual_seed(0)
    callbacks = [QAT("w8a8", schedule={"activations_start": "epoch 1"}), Lagging()]
    module = Look()
    trainer(*(callbacks if first else callbacks[::-1]), num_sanity_val_steps=0).fit(module, datamodule=data)
    assert seen[-4:] == [False] * 4  # the rest is of the calibration
    assert trained == [False] * 4 + [True] * 4


def test_an_old_state_that_is_loaded_while_training(trainer, data):
    states = []

    class GoesBack(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            states.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})
            if trainer.current_epoch == 2:
                pl_module.load_state_dict(states[0])
                assert not any(q.is_enabled for q in quantizers(pl_module) if q.name.endswith("input"))

        def on_train_batch_end(self, trainer, pl_module, *rest):
            enabled.append(all(q.is_enabled for q in quantizers(pl_module)))

    enabled = []
    torch.manual_seed(0)
    trainer(QAT("w8a8", schedule={"activations_start": "epoch 1"}), GoesBack(), max_epochs=3).fit(
        Module(), datamodule=data
    )
    assert enabled == [False] * 4 + [True] * 8


class WithTeacher(Module):
    """Its teacher takes over what the student has, as one that is averaged over steps does, in every way of these."""

    def __init__(self, way):
        super().__init__()
        self.way, self.teacher = way, copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + (self(batch[0]) - target).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        if self.way == "state":
            self.teacher.load_state_dict(self.net.state_dict())
        else:
            for held in ("parameters", "buffers"):
                for mine, theirs in zip(getattr(self.net, held)(), getattr(self.teacher, held)(), strict=True):
                    theirs.copy_(mine)


@pytest.mark.filterwarnings("ignore:QAT. no calibration batch reached teacher")
@pytest.mark.parametrize("way", ["state", "one by one"])
@pytest.mark.parametrize("weight", ["int8 per_channel", "int4 per_channel lsq"])
def test_a_teacher_that_takes_over_its_student_is_named_by_a_rule(weight, way, trainer, data):
    torch.manual_seed(0)
    module = WithTeacher(way)
    rules = [{"match": match, "weight": weight, "input": "uint8 affine ema"} for match in ("*", "teacher.*")]
    trainer(QAT({"rules": rules})).fit(module, datamodule=data)
    module.eval()
    assert torch.equal(module.net(data.x), module.teacher(data.x))
    assert not torch.equal(module.net(data.x), WithTeacher(way).eval().net(data.x))
