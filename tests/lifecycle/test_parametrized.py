"""Layers with computed weights (weight_norm, spectral_norm, orthogonal, LoRA-like) in a Trainer's whole life."""

import copy
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.utils import parametrizations, parametrize

from lq_plugin import PTQ, QAT, load_checkpoint, remove
from lq_plugin.callbacks import QuantMonitor
from lq_plugin.model import quantizers
from lq_plugin.model.prepare import quantized_layers
from tests.callbacks.conftest import Module, ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings(
        "ignore:You're using the WeightAveraging callback with a model that overrides the configure_model"
    ),
]
PLANS = ["w4 mse a8", "w4 lsq a4 lsq"]
every_plan = pytest.mark.parametrize("plan", PLANS)


class LowRank(torch.nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.randn(rows, 1)), torch.nn.Parameter(torch.randn(1, columns))

    def forward(self, weight):
        return weight + self.a @ self.b


class Parametrized(Module):
    """A convolution with spectral_norm, one with weight_norm, and a linear layer with a low-rank addition to its frozen
    weight."""

    def __init__(self, optimizers=None):
        super().__init__(optimizers=optimizers)
        parametrizations.spectral_norm(self.net.conv)
        parametrizations.weight_norm(self.net.conv2)
        self.net.fc.weight.requires_grad_(False)
        parametrize.register_parametrization(self.net.fc, "weight", LowRank(*self.net.fc.weight.shape))


def states_equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def test_with_all_quantizers_off_it_is_the_float_run(trainer, data):
    """Bit for bit, with the vectors of spectral_norm: nothing computes a weight once too often."""
    states = []
    for callbacks in ([], [QAT("w4 mse a8", schedule={"weights_start": "epoch 9", "activations_start": "epoch 9"})]):
        L.seed_everything(5, verbose=False)
        module = Parametrized()
        trainer(*callbacks).fit(module, datamodule=data)
        assert bool(callbacks) == bool(quantizers(module))
        remove(module)
        states.append(module.state_dict())
    assert states_equal(*states)
    assert {key for key in states[0] if "net.conv." in key} >= {
        f"net.conv.parametrizations.weight.0.{v}" for v in ("_u", "_v")
    }


@every_plan
def test_stopped_and_resumed_saved_and_loaded(plan, trainer, data, tmp_path):
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)

    def run(resume=None):
        L.seed_everything(1, verbose=False)
        module = Parametrized()
        folder = tmp_path / ("whole" if resume is None else "resumed")
        keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        fit = trainer(QAT(plan), keep, enable_checkpointing=True)
        fit.fit(module, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else True)
        return module, fit

    module, fit = run()
    again, _ = run(tmp_path / "whole" / "step=3.ckpt")
    assert states_equal(module.state_dict(), again.state_dict())
    assert [name for name, _ in quantized_layers(module)] == ["net.conv", "net.conv2", "net.fc"]
    fit.save_checkpoint(tmp_path / "end.ckpt")
    fresh = Parametrized()
    load_checkpoint(fresh, tmp_path / "end.ckpt")
    with torch.no_grad():
        want = module.eval()(data.x)
        assert torch.equal(fresh.eval()(data.x), want)
        # What cannot be exported with a computed weight can be without.
        for _, layer in quantized_layers(fresh):
            parametrize.remove_parametrizations(layer, "weight")
        assert torch.equal(fresh(data.x), want)
    plain = Module()
    remove(fresh)
    plain.load_state_dict(fresh.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_quantizer"):
        trainer().validate(Parametrized(), datamodule=data, ckpt_path=tmp_path / "end.ckpt", weights_only=True)


def two_groups(module):
    """Each layer's parameters in a group of its own; the scales are nowhere in them."""
    layers = [module.net.conv, module.net.conv2, module.net.fc]
    groups = [
        {
            "params": [p for name, p in layer.named_parameters() if "quantizer" not in name and p.requires_grad],
            "lr": 10.0**-n,
        }
        for n, layer in enumerate(layers, 2)
    ]
    return torch.optim.SGD(groups, weight_decay=0.1)


def test_a_learned_scale_is_where_its_weight_comes_from(trainer, data):
    """It has the learning rate of what its weight is computed from, no weight decay, and is trained."""
    L.seed_everything(0, verbose=False)
    module = Parametrized(optimizers=two_groups)
    fit = trainer(QAT("w4 lsq a4 lsq"), max_epochs=1)
    before = {}

    class Remember(L.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    fit.callbacks.append(Remember())
    fit.fit(module, datamodule=data)
    groups = {id(p): group for group in fit.optimizers[0].param_groups for p in group["params"]}
    for rate, (_, layer) in zip((1e-2, 1e-3, 1e-4), quantized_layers(module), strict=True):
        scales = [p for q in (layer.weight_quantizer, layer.input_quantizer) for p in q.parameters()]
        assert [(groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for p in scales] == [(rate, 0.0)] * 3
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {
        name for name in before if name.startswith(("net.conv.", "net.conv2.")) and "zero_point" not in name
    }
    assert "net.fc.parametrizations.weight.original" not in moved
    assert "net.fc.weight_quantizer.scale" in moved


@every_plan
def test_calibrated_without_a_trace(plan, trainer, data):
    L.seed_everything(0, verbose=False)
    module = Parametrized()
    state = copy.deepcopy(module.state_dict())
    phases = ["calibrate"] if "lsq" in plan else ["fold_batch_norm", "equalize", "calibrate", "gptq"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer(PTQ(plan, phases=phases)).validate(module, datamodule=data, verbose=False)
    said = [str(warning.message).partition(":")[2] for warning in warned]
    kept = [message for message in said if "keeps nearest rounding: its weight is computed" in message]
    assert len(kept) == 3 * ("gptq" in phases)
    now = module.state_dict()
    assert all(torch.equal(now[key], value) for key, value in state.items() if "parametrizations" in key)
    assert all(q.is_calibrated for q in quantizers(module))


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_other_callbacks(first, trainer, data, tmp_path):
    """Averages of all that a weight is computed from; a learning rate finder that leaves no trace."""
    states = []
    for finders in (
        [],
        [LearningRateFinder(num_training_steps=4, min_lr=1e-5, max_lr=1e-3, early_stop_threshold=None)],
    ):
        L.seed_everything(0, verbose=False)
        module = Parametrized()
        module.lr = 0.1
        others, ours = [*finders, EMAWeightAveraging(decay=0.7)], [QAT("w4 lsq a4 lsq")]
        fit = trainer(*(others + ours if first else ours + others), max_epochs=1)
        fit.fit(module, datamodule=data)
        states.append(module.state_dict())
        fit.save_checkpoint(tmp_path / "averaged.ckpt")
        fresh = Parametrized()
        load_checkpoint(fresh, tmp_path / "averaged.ckpt")
        with torch.no_grad():
            assert torch.equal(fresh.eval()(data.x), module.eval()(data.x))
    assert states_equal(*states)


def test_monitored_without_a_trace(trainer, data, tmp_path):
    """Numbers at every step: the run is the one that nobody watches, bit for bit."""
    states = []
    for monitored in (False, True):
        L.seed_everything(0, verbose=False)
        module = Parametrized()
        watching = [QuantMonitor(every_n_steps=1, images=False, page=False, terminal=False)] if monitored else []
        logger = CSVLogger(tmp_path) if monitored else False
        fit = trainer(QAT("w2 mse a8"), *watching, logger=logger, log_every_n_steps=1)
        fit.fit(module, datamodule=data)
        states.append(module.state_dict())
    assert "net.conv/weight_flips" in (Path(fit.log_dir) / "metrics.csv").read_text()
    assert states_equal(*states)
