"""Learned scales beside every scheduler of torch, several optimizers, manual optimization and accumulated gradients."""

import copy
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler as S

from lq_plugin import QAT
from lq_plugin.model.prepare import quantized_layers, quantizers
from tests.callbacks.conftest import Module, ResumableLoader

PLAN = "w4 lsq a4 lsq"
SCHEDULERS = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda e: 0.9**e),
    "LambdaLR, one a group": lambda o: S.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.7**e]),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: S.CyclicLR(o, [1e-3, 2e-3], [1e-2, 2e-2], step_size_up=3),
    "OneCycleLR": lambda o: S.OneCycleLR(o, [1e-2, 2e-2], total_steps=8),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=0, threshold=10.0, min_lr=[1e-4, 2e-4]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, 3), S.ExponentialLR(o, 0.9)], optimizer=o),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, total_iters=2), S.CosineAnnealingLR(o, 6)], milestones=[2]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, [1e-3, 2e-3], anneal_epochs=4),
}
QUICK = ("LambdaLR, one a group", "CyclicLR", "OneCycleLR", "ReduceLROnPlateau", "ChainedScheduler", "SWALR")
pytestmark = [pytest.mark.filterwarnings("ignore:The dirpath has changed")]


def test_no_scheduler_of_torch_is_left_out():
    assert {name.partition(",")[0] for name in SCHEDULERS} == {name for name in S.__all__ if name != "LRScheduler"} | {
        "SWALR"
    }


def two_groups(scheduler):
    """Explicit groups, of the weights alone: the scales are nowhere in them."""

    def make(module):
        rest = [p for name, p in module.named_parameters() if "quantizer" not in name and "conv2" not in name]
        conv2 = [p for name, p in module.named_parameters() if "quantizer" not in name and "conv2" in name]
        groups = [{"params": rest, "lr": 1e-2}, {"params": conv2, "lr": 2e-2}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
        made = SCHEDULERS[scheduler](optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": made, "interval": "step", "monitor": "train/loss", "strict": False},
        }

    return make


class Rates(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SCHEDULERS]
)
def test_scales_follow_the_rate_of_their_weight_and_resume(name, trainer, data, tmp_path):
    """A scale's rate is that of its weight's group at every step, without weight decay; resumed, the run ends
    bit-equal."""
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)

    def run(resume=None):
        L.seed_everything(1, verbose=False)
        module, rates = Module(optimizers=two_groups(name)), Rates()
        keep = ModelCheckpoint(
            tmp_path / ("whole" if resume is None else "resumed"),
            filename="{step}",
            save_top_k=-1,
            every_n_train_steps=3,
        )
        fit = trainer(QAT(PLAN), keep, rates, enable_checkpointing=True)
        fit.fit(module, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else False)
        return module, fit.optimizers[0], rates.seen

    module, optimizer, rates = run()
    groups = optimizer.param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(8, 0.1), (1, 0.1), (6, 0.0), (3, 0.0)]
    assert all(seen[2] == seen[0] and seen[3] == seen[1] for seen in rates)
    assert len({seen[0] for seen in rates}) > 1
    held = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    for layer_name, layer in quantized_layers(module):
        home = 3 if layer_name == "net.conv2" else 2
        scales = [p for q in (layer.weight_quantizer, layer.input_quantizer) for p in q.parameters()]
        assert [held[id(p)] for p in scales] == [home] * 3
    again, optimizer2, rates2 = run(tmp_path / "whole" / "step=3.ckpt")
    assert rates2 == rates[3:]
    states = module.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), optimizer2.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


class Manual(Module):
    """Two optimizers, stepped by hand in turn."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        convs = [
            *self.net.conv.parameters(),
            *self.net.bn.parameters(),
            *self.net.conv2.parameters(),
            *self.net.bn2.parameters(),
        ]
        return torch.optim.SGD(convs, 1e-2, weight_decay=0.1), torch.optim.AdamW(self.net.fc.parameters(), 1e-2)


def test_two_optimizers_by_hand(trainer, data):
    """Each scale is in the optimizer of its weight, and moves when that one steps."""
    L.seed_everything(0, verbose=False)
    module, seen = Manual(), []

    class Watch(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.on_train_batch_end(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, *_):
            net = pl_module.net
            seen.append(
                (net.conv.weight_quantizer.scale.detach().clone(), net.fc.weight_quantizer.scale.detach().clone())
            )

    fit = trainer(QAT(PLAN), Watch(), max_epochs=1)
    fit.fit(module, datamodule=data)
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in fit.optimizers]
    for name, layer in quantized_layers(module):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            for p in quantizer.parameters():
                assert [id(p) in ids for ids in held] == ([False, True] if name == "net.fc" else [True, False])
    moved = [
        [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        for before, after in itertools.pairwise(seen)
    ]
    assert moved == [[True, False], [False, True]] * 2


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_two_optimizers_resume(trainer, data, tmp_path):
    """By hand, of two kinds, with momentum and step counts: bit-equal, from the middle of an epoch."""
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)

    def run(resume=None):
        L.seed_everything(1, verbose=False)
        module = Manual()
        keep = ModelCheckpoint(
            tmp_path / ("whole" if resume is None else "resumed"),
            filename="{step}",
            save_top_k=-1,
            every_n_train_steps=3,
        )
        fit = trainer(QAT(PLAN), keep, enable_checkpointing=True)
        fit.fit(module, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else False)
        return module.state_dict(), [optimizer.state_dict() for optimizer in fit.optimizers]

    whole = run()
    again = run(tmp_path / "whole" / "step=3.ckpt")
    assert whole[0].keys() == again[0].keys()
    assert all(torch.equal(again[0][key], value) for key, value in whole[0].items())
    for mine, theirs in zip(whole[1], again[1], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys()
        for key, state in mine["state"].items():
            assert all(
                torch.equal(torch.as_tensor(theirs["state"][key][name]), torch.as_tensor(value))
                for name, value in state.items()
            )


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer_at_all(trainer, data):
    """Ranges are found and move; what would be learned stays."""
    module = Module(optimizers=lambda module: None)
    before = {}

    class Remember(L.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    trainer(QAT("w4 lsq a4 lsq"), Remember()).fit(module, datamodule=data)
    assert len(before) == 18
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert all(q.is_calibrated for q in quantizers(module))


def test_accumulated_gradients_are_those_of_the_joined_batch(trainer, data):
    """Two halves of a batch, accumulated, are the batch; the schedule counts optimizer steps."""
    data.x = data.x.double()  # sums of gradients in another order stay comparable
    states = []
    for size, accumulate in ((32, 1), (16, 2)):
        L.seed_everything(0, verbose=False)
        module = Module(optimizers=lambda m: torch.optim.SGD(m.parameters(), 0.05))
        module.net.bn = module.net.bn2 = torch.nn.Identity()  # sees half of the batch
        data.batch_size = size
        qat = QAT("w4 lsq a4 mse", schedule={"weights_start": "step 1"}, init_batches=2 * accumulate)
        fit = trainer(qat, accumulate_grad_batches=accumulate, max_epochs=2)
        fit.fit(module.double(), datamodule=data)
        assert fit.global_step == 4
        states.append({name: p.detach() for name, p in module.named_parameters()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)


def one_group(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


def decayed_groups(module):
    """Two groups with rates of their own and a scheduler inside a scheduler."""
    first, *others = [
        m.parameters() for m in (module.net.conv, module.net.bn, module.net.conv2, module.net.bn2, module.net.fc)
    ]
    groups = [{"params": first, "lr": 1e-3}, {"params": [p for held in others for p in held], "lr": 2e-3}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
    later = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, later], milestones=[2])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def names_of(module):
    return {id(p): name for name, p in module.named_parameters()}


@pytest.mark.parametrize("optimizers", [one_group, decayed_groups, None])
def test_a_float_checkpoint_goes_on_with_learned_scales(optimizers, trainer, data, tmp_path):
    """The optimizer's state of a weight stays with it; scales begin with nothing, at the rate of their weight's
    group."""
    L.seed_everything(0, verbose=False)
    module = Module(optimizers=optimizers)
    before = trainer(max_epochs=1)
    before.fit(module, datamodule=data)
    before.save_checkpoint(tmp_path / "float.ckpt")
    old_names = names_of(module)
    old = {old_names[id(p)]: copy.deepcopy(state) for p, state in before.optimizers[0].state.items()}
    rates = [group["lr"] for group in before.optimizers[0].param_groups]
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            names, optimizer = names_of(pl_module), trainer.optimizers[0]
            seen["state"] = {names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items()}
            seen["groups"] = [
                (group["lr"], group.get("weight_decay"), [names[id(p)] for p in group["params"]])
                for group in optimizer.param_groups
            ]

    module = Module(optimizers=optimizers)
    after = trainer(QAT("w4 lsq a4 lsq"), Look(), max_epochs=2)
    after.fit(module, datamodule=data, ckpt_path=tmp_path / "float.ckpt", weights_only=True)
    assert after.global_step == 2 * before.global_step
    assert seen["state"].keys() == old.keys()
    for name, state in old.items():
        assert all(
            torch.equal(torch.as_tensor(seen["state"][name][key]), torch.as_tensor(value))
            for key, value in state.items()
        )
    homes = {name: lr for lr, _, names in seen["groups"] for name in names}
    assert len(homes) == len(list(module.parameters()))
    assert [lr for lr, _, _ in seen["groups"][: len(rates)]] == rates
    for layer in ("conv", "conv2", "fc"):
        for slot in ("weight", "input"):
            assert homes[f"net.{layer}.{slot}_quantizer.scale"] == homes[f"net.{layer}.weight"]
    decays = {name: decay for _, decay, names in seen["groups"] for name in names}
    assert {decay for name, decay in decays.items() if "scale" in name} == {0}
    for config in after.lr_scheduler_configs:
        assert len(config.scheduler.get_last_lr()) == len(after.optimizers[0].param_groups)
        assert all(len(inner.base_lrs) == len(seen["groups"]) for inner in config.scheduler._schedulers)
        finals = {
            name: group["lr"]
            for group in after.optimizers[0].param_groups
            for name in map(names_of(module).get, map(id, group["params"]))
        }
        assert finals["net.conv.weight_quantizer.scale"] == finals["net.conv.weight"] < homes["net.conv.weight"]


def test_a_float_checkpoint_of_another_optimizer_is_left_to_torch(trainer, data, tmp_path):
    before = trainer(max_epochs=1)
    before.fit(Module(), datamodule=data)
    before.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match="loaded state dict has a different number of parameter groups"):
        trainer(QAT("w4 lsq"), max_epochs=2).fit(
            Module(optimizers=decayed_groups), datamodule=data, ckpt_path=tmp_path / "float.ckpt", weights_only=True
        )
