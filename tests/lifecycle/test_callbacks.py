"""Lightning's own callbacks beside QAT, in any order: they see the quantized model, and it stays quantized."""

import random

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lq_plugin import QAT, load_checkpoint, remove
from lq_plugin.model import quantizers
from lq_plugin.model.prepare import quantized_layers
from tests.callbacks.conftest import Module

PLANS = ["w4a8", "w3 lsq a4 lsq"]
ORDERS = pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
# Lightning's advice on what these callbacks do.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:You're using the WeightAveraging callback with a model that overrides the configure_model"
    ),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step"),
]


class Steps(L.Callback):
    """The parameters after each optimizer step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def ordered(first, other, ours):
    return [other, ours] if first else [ours, other]


def assert_quantized(module):
    found = quantizers(module)
    assert len(found) == 6
    assert all(q.is_calibrated and bool(q.calibrated) for q in found if q.needs_calibration)
    assert all(q.is_enabled and bool(q.enabled) for q in found)
    for _, layer in quantized_layers(module):
        assert (
            max(len(row.unique()) for row in layer.quantized_weight().detach())
            <= layer.weight_quantizer.spec.grid.levels
        )


@ORDERS
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.7)], ids=["mean", "ema"])
def test_averaged_weights_and_scales_are_the_formula(make, plan, first, trainer, data, tmp_path):
    """Parameters, learned scales included, are averaged; switches are copied, also when they changed on the way."""
    L.seed_everything(0, verbose=False)
    module, averaging, steps = Module(), make(), Steps()
    qat = QAT(plan, schedule={"weights_start": "step 2", "activations_start": "step 3"})
    fit = trainer(*ordered(first, averaging, qat), steps, enable_checkpointing=True)
    fit.fit(module, datamodule=data)
    want = steps.states[0]
    for count, state in enumerate(steps.states[1:], 1):
        share = (
            1 / (count + 1)
            if isinstance(averaging, WeightAveraging) and not isinstance(averaging, EMAWeightAveraging)
            else 0.3
        )
        want = {name: value + share * (state[name] - value) for name, value in want.items()}
    got = dict(module.named_parameters())
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].detach(), value, msg=name)
    assert_quantized(module)
    fresh = Module()
    fit.save_checkpoint(tmp_path / "averaged.ckpt")
    load_checkpoint(fresh, tmp_path / "averaged.ckpt")
    assert torch.equal(fresh.eval()(data.x), module.eval()(data.x))


@ORDERS
@pytest.mark.parametrize("plan", PLANS)
def test_stochastic_weight_averaging(plan, first, trainer, data):
    """The average is that of parameters, learned scales included, at the start of each epoch from the second on."""
    L.seed_everything(0, verbose=False)
    module, steps = Module(), Steps()
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    trainer(*ordered(first, swa, QAT(plan)), steps, max_epochs=3).fit(module, datamodule=data)
    got = dict(module.named_parameters())
    for name in got:
        want = (steps.states[3][name] + steps.states[7][name]) / 2
        torch.testing.assert_close(got[name].detach(), want, msg=name)
    assert_quantized(module)


@ORDERS
def test_pruned_weights_stay_zero_and_quantized(first, trainer, module, data):
    pruning = ModelPruning(
        "l1_unstructured", amount=0.5, parameter_names=["weight"], use_lottery_ticket_hypothesis=False
    )
    trainer(*ordered(first, pruning, QAT("w4a8"))).fit(module, datamodule=data)
    assert_quantized(module)
    for _, layer in quantized_layers(module):
        assert torch.equal(layer.quantized_weight()[layer.weight == 0], torch.zeros(int((layer.weight == 0).sum())))
    zeros = sum(int((layer.quantized_weight() == 0).sum()) for _, layer in quantized_layers(module))
    assert zeros >= 0.5 * sum(layer.weight.numel() for _, layer in quantized_layers(module))
    remove(module)
    assert {type(m) for m in module.net.children()} == {torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Linear}


@ORDERS
@pytest.mark.parametrize("plan", PLANS)
def test_the_learning_rate_finder_tries_the_quantized_model_and_leaves_no_trace(plan, first, trainer, data):
    """The optimizer does not use the rate it finds: the run is the one without a finder, bit for bit."""
    states = []
    for finders in (
        [],
        [LearningRateFinder(num_training_steps=6, min_lr=1e-5, max_lr=1e-3, early_stop_threshold=None)],
    ):
        L.seed_everything(0, verbose=False)
        module = Module()
        module.lr = 0.1
        callbacks = [*finders, QAT(plan)] if first else [QAT(plan), *finders]
        trainer(*callbacks).fit(module, datamodule=data)
        assert_quantized(module)
        states.append(module.state_dict())
        losses = finders and finders[0].optimal_lr.results["loss"]
    assert len(losses) == 6
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


@ORDERS
@pytest.mark.parametrize("plan", PLANS)
def test_the_batch_size_finder(plan, first, trainer, module, data):
    finder = BatchSizeFinder(mode="power", init_val=4, max_trials=2, steps_per_trial=1)
    fit = trainer(*ordered(first, finder, QAT(plan)), max_epochs=1)
    fit.fit(module, datamodule=data)
    assert data.batch_size > 4
    assert fit.global_step == -(-64 // data.batch_size)
    assert_quantized(module)


@ORDERS
def test_early_stopping_and_the_best_checkpoint_judge_the_quantized_model(first, trainer, module, data, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    fit = trainer(
        *ordered(first, EarlyStopping("val/loss", patience=1), QAT("w3a4")),
        best,
        enable_checkpointing=True,
        max_epochs=6,
    )
    fit.fit(module, datamodule=data)
    fresh = Module()
    load_checkpoint(fresh, best.best_model_path)
    got = trainer().validate(fresh, datamodule=data, verbose=False)[0]["val/loss"]
    assert got == pytest.approx(best.best_model_score.item(), abs=0)
    assert_quantized(fresh)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("changing", ["averaged", "pruned"])  # Lightning cannot do both at once, quantized or not
def test_many_callbacks_in_any_order(changing, seed, trainer, module, data, tmp_path):
    """All at once, shuffled: what they leave is quantized, and their checkpoints answer the same."""
    pruning = ModelPruning(
        "l1_unstructured", amount=0.5, parameter_names=["weight"], use_lottery_ticket_hypothesis=False
    )
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    callbacks = [
        QAT("w4 lsq a4 lsq"),
        EMAWeightAveraging(decay=0.5) if changing == "averaged" else pruning,
        EarlyStopping("val/loss", patience=3),
        LearningRateFinder(num_training_steps=4, min_lr=1e-5, max_lr=1e-3, early_stop_threshold=None),
        best,
    ]
    random.Random(seed).shuffle(callbacks)
    module.lr = 0.1
    fit = trainer(*callbacks, enable_checkpointing=True)
    fit.fit(module, datamodule=data)
    assert_quantized(module)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    fresh = Module()
    load_checkpoint(fresh, tmp_path / "end.ckpt")
    assert torch.equal(fresh.eval()(data.x), module.eval()(data.x))
    zeros = sum(int((layer.quantized_weight() == 0).sum()) for _, layer in quantized_layers(fresh))
    assert changing == "averaged" or zeros >= 0.5 * sum(layer.weight.numel() for _, layer in quantized_layers(fresh))
    if changing == "averaged":  # Lightning measures, prunes, and then writes its checkpoint
        fresh = Module()
        load_checkpoint(fresh, best.best_model_path)
        got = trainer().validate(fresh, datamodule=data, verbose=False)[0]["val/loss"]
        assert got == pytest.approx(best.best_model_score.item(), abs=0)
