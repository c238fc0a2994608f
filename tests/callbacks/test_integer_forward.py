"""QAT(forward="integer") in real Trainers."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QAT, PlanError, remove
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.layers.integer import integer_choices, integer_report
from lq_plugin.layers.integer.kernels import integer_kernels, sums_exactly
from tests.callbacks.conftest import Data, Module, ResumableLoader

needs_kernels = pytest.mark.skipif(isinstance(integer_kernels(), str), reason=str(integer_kernels()))
#: Without VNNI, products of 8 bits saturate in torch, and those of 7 are computed with integers.
PLAN = "w8a8" if sums_exactly(127) else "w7a8"
LAYERS = ("net.conv", "net.conv2", "net.fc")


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_unknown_forward_is_refused():
    with pytest.raises(PlanError, match="forward is one of fake_quantize, integer, integer_always, got 'int8'"):
        QAT("w8a8", forward="int8")


@needs_kernels
def test_layers_are_named_and_keys_stay(trainer, module, data, monkeypatch):
    keys, said = None, []
    monkeypatch.setattr("lq_plugin.callbacks.qat.rank_zero_info", said.append)
    for forward in ("fake_quantize", "integer_always"):
        L.seed_everything(0, verbose=False)
        trained = Module()
        trainer(QAT(PLAN, forward=forward)).fit(trained, datamodule=data)
        assert keys is None or set(trained.state_dict()) == keys
        keys = set(trained.state_dict())
    assert integer_report(trained) == dict.fromkeys(LAYERS, "integer")
    assert "net.conv2: integer" in "".join(said)
    remove(trained)
    trainer(QAT(PLAN), max_epochs=1).fit(module, datamodule=data)
    assert integer_report(module) == {}


@needs_kernels
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_measured_run_resumes_bit_equal(trainer, tmp_path, monkeypatch):
    ratios = iter(
        [0.5, 2.0, 0.7]
    )  # for one trial of each layer; what a trial measures is the machine's: here it is given
    monkeypatch.setattr("lq_plugin.layers.integer.forward._trial", lambda *_: next(ratios))
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(16, 1, 6, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(4)
    ]

    def run(**options):
        L.seed_everything(0, verbose=False)
        module = Module()
        resume = options.pop("resume", None)
        keep = ModelCheckpoint(tmp_path / str(resume is None), filename="{step}", every_n_train_steps=2, save_top_k=-1)
        fit = trainer(QAT(PLAN, forward="integer"), keep, enable_checkpointing=True, **options)
        fit.fit(module, ResumableLoader(batches), Data().val_dataloader(), ckpt_path=resume)
        return module

    whole = run(max_epochs=3)
    assert integer_choices(whole) == dict(zip(LAYERS, (True, False, True), strict=True))
    resumed = run(max_epochs=3, resume=tmp_path / "True" / "step=6.ckpt")
    assert integer_choices(resumed) == integer_choices(whole)
    assert states_equal(whole.state_dict(), resumed.state_dict())


class _Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save((integer_choices(pl_module), pl_module.state_dict()), self.path / f"rank{trainer.global_rank}.pt")


class _Ranked(QAT):
    """Each rank measures something else."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        for index, name in enumerate(LAYERS):
            pl_module.get_submodule(name)._integer_state.ratio = 0.5 if (index + trainer.global_rank) % 2 else 2.0


@needs_kernels
@pytest.mark.slow
def test_ranks_choose_alike(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 1, 6, 6, generator=generator), torch.arange(64) % 4), batch_size=16)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", callbacks=[_Ranked(PLAN, forward="integer"),
        _Save(tmp_path)],
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    trainer.fit(Module(), data)
    (choices, state), (others, other_state) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert choices == others == dict(zip(LAYERS, (False, True, False), strict=True))
    assert all(torch.equal(state[key], other_state[key]) for key in state if "running" not in key or "quantizer" in key)


@needs_kernels
@pytest.mark.slow
def test_digits_are_learned_as_well(trainer):
    accuracies = {}
    for forward in ("fake_quantize", "integer_always"):
        accuracies[forward] = []
        for seed in range(2):
            L.seed_everything(seed, verbose=False)
            fit, module, data = trainer(QAT(PLAN, forward=forward), max_epochs=6), DigitsCNN(), DigitsDataModule()
            fit.fit(module, datamodule=data)
            accuracies[forward].append(fit.test(module, datamodule=data, verbose=False)[0]["test/acc"])
    means = {forward: sum(found) / len(found) for forward, found in accuracies.items()}
    assert means["fake_quantize"] > 0.9
    assert abs(means["integer_always"] - means["fake_quantize"]) < 0.03
