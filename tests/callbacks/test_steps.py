"""Calibration runs a module's own step as Lightning's loops do: with the same arguments, after the same hooks, on
batches it takes."""

import functools
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, CalibrationError
from lq_plugin.model import quantizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter"),
]


def x_of(size=32, seed=0):
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))


def loader(size=32, seed=0):
    return DataLoader(TensorDataset(x_of(size, seed)), batch_size=8)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        L.seed_everything(0, verbose=False)
        self.net = nn.Linear(8, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self(batch[0]).square().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks, **options):
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        return L.Trainer(
            accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=list(callbacks), **quiet | options
        )

    return make


def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return wrapper


# What each step notes is what it was called with besides the batch.
def batch_only(self, batch):
    self.note(batch)


def short_names(self, b, i):
    self.note(b, i)


def any_arguments(self, *args):
    self.note(*args)


def batch_and_any(self, batch, *args, **kwargs):
    self.note(batch, *args, **kwargs)


def loader_number(self, b, _, dataloader_idx=None):
    self.note(b, _, dataloader_idx)


def own_default(self, b, batch_idx, prefix="v"):
    self.note(b, batch_idx, prefix)


def several_needed(self, batch, batch_idx, dataloader_idx):
    self.note(batch, batch_idx, dataloader_idx)


def iterator(self, dataloader_iter):
    self.note(*next(dataloader_iter))


ONE_LOADER = [
    batch_only,
    short_names,
    any_arguments,
    batch_and_any,
    loader_number,
    own_default,
    iterator,
    decorated(short_names),
]
SEVERAL_LOADERS = [any_arguments, batch_and_any, loader_number, several_needed, decorated(several_needed)]


class Noting(Net):
    """Remembers the arguments behind the batch, and what the Trainer was doing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def note(self, batch, *args, **kwargs):
        self(batch[0])
        self.calls.append((args, kwargs))


CASES = [(step, False, False) for step in ONE_LOADER] + [(step, True, False) for step in SEVERAL_LOADERS]
CASES += [
    (any_arguments, False, True),
    (any_arguments, True, True),
    (loader_number, False, True),
    (several_needed, True, True),
]


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize(("step", "several", "fit"), CASES)
def test_a_step_gets_the_arguments_that_lightning_gives(step, several, fit, trainer):
    kind = type("Step", (Noting,), {"validation_step": step})
    loaders = [loader(8), loader(8)] if several else loader(8)

    def first_call(*callbacks):
        module = kind()
        if fit:
            trainer(*callbacks).fit(module, loader(8), loaders)
        else:
            trainer(*callbacks).validate(module, loaders, verbose=False)
        return module.calls[0]

    right = first_call()
    assert first_call(QAT("w8a8") if fit else PTQ("w8a8", dataloader=loader(8))) == right


class Stagewise(L.LightningDataModule):
    """Makes in `setup` what the stage needs and nothing else, as Lightning's documentation has it."""

    def setup(self, stage):
        if stage == "fit":
            self.train = loader()
        if stage in ("fit", "validate"):
            self.val = loader(8, seed=1)
        if stage in ("test", "predict"):
            self.last = loader(8, seed=2)

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val

    def test_dataloader(self):
        return self.last

    predict_dataloader = test_dataloader


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
@pytest.mark.parametrize("plan", ["w8a8", "w4"])
def test_a_datamodule_that_makes_each_stage_apart(run, plan, trainer):
    found = []
    for given in (None, loader()):
        module = Net()
        getattr(trainer(PTQ(plan, dataloader=given)), run)(module, datamodule=Stagewise())
        found.append(module.state_dict())
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_weights_alone_need_no_training_data(run, trainer):
    module, callback = Net(), PTQ("w4", min_coverage={"weights": 1.0})
    getattr(trainer(callback), run)(module, loader(8))
    assert callback.ledger["net"].calls == 1
    assert module.net.weight_quantizer.is_calibrated


def test_lightnings_own_boring_classes(trainer):
    model = BoringModel()
    trainer(PTQ("w8a8"), limit_val_batches=2).validate(model, datamodule=BoringDataModule(), verbose=False)
    trainer(PTQ("w8a8"), limit_test_batches=2).test(model, datamodule=BoringDataModule(), verbose=False)
    assert all(q.is_calibrated for q in quantizers(model) if q.needs_calibration)


def test_training_data_that_a_fit_alone_makes_is_named(trainer):
    class Data(Stagewise):
        def train_dataloader(self):
            if not self.trainer.training:
                raise FileNotFoundError("train.bin")
            return self.train

    with pytest.raises(
        CalibrationError, match=r"Data\.train_dataloader fails in an evaluation.*train\.bin.*dataloader="
    ):
        trainer(PTQ("w8a8")).validate(Net(), datamodule=Data(), verbose=False)


class MadeInFitStart(Net):
    def on_fit_start(self):
        self.factor = torch.full((), 2.0)

    def validation_step(self, batch, batch_idx):
        self.log("val", self(self.factor * batch[0]).mean())


class MadeInValidationStart(Net):
    def on_validation_start(self):
        self.factor = 2.0

    def validation_step(self, batch, batch_idx):
        self.log("val", self(self.factor * batch[0]).mean())


class MadeInEpochStart(Net):
    """A placeholder in `__init__`, so that it is no missing attribute that tells."""

    def __init__(self):
        super().__init__()
        self.factor = None

    def on_validation_epoch_start(self):
        self.factor = 2.0

    def validation_step(self, batch, batch_idx):
        self.log("val", self(self.factor * batch[0]).mean())


@pytest.mark.parametrize("kind", [MadeInFitStart, MadeInValidationStart, MadeInEpochStart])
@pytest.mark.parametrize("fit", [False, True], ids=["validate", "fit"])
def test_what_hooks_make_is_there_in_the_calibration(kind, fit, trainer):
    if kind is MadeInFitStart and not fit:
        pytest.skip("Lightning calls on_fit_start in a fit alone")
    module = kind()
    if fit:
        trainer(QAT("int8 per_channel / int8 minmax")).fit(module, loader(), loader(8))
    else:
        trainer(PTQ("int8 per_channel / int8 minmax", dataloader=loader())).validate(module, loader(8), verbose=False)
    # The range is that of the batches as the step hands them on, of the first one in a fit.
    largest = 2.0 * (x_of()[:8] if fit else x_of()).abs().max()
    torch.testing.assert_close(module.net.input_quantizer.scale, (largest / 127).reshape(1))


class ReadsTheTrainer(Net):
    """Its step names what it logs by the Trainer's stage, and counts by the Trainer's loaders."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def validation_step(self, batch, batch_idx):
        name = {"sanity_check": "val", "validate": "val"}[self.trainer.state.stage]
        self.seen.append((self.trainer.training, self.trainer.evaluating))
        self.log(f"{name}/loss", self(batch[0]).sum() / len(self.trainer.val_dataloaders.dataset))


class ReadsItsShare(ReadsTheTrainer):
    def __init__(self):
        super().__init__()
        self.made, self.shares = 0, []

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        self.made += 1
        return loader(32, 1)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.shares.append(len(self.trainer.val_dataloaders.sampler) / self.trainer.num_val_batches[0])


@pytest.mark.parametrize("checks", [0, 2])
def test_the_trainer_is_in_the_stage_of_the_step_and_has_its_loaders(checks, trainer):
    run = trainer(QAT("w8a8"), num_sanity_val_steps=checks)
    module = ReadsItsShare()
    run.fit(module)
    assert set(module.seen) == {(False, True)}
    assert module.made == 1
    assert list(run.callback_metrics) == ["val/loss"]


@pytest.mark.slow
def test_two_processes_make_the_loaders_that_a_step_reads(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.test_steps", str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    # 16 of 32 samples each, in batches of 8; the loader is made once.
    assert first["made"] == second["made"] == 1
    assert set(first["shares"]) == set(second["shares"]) == {8.0}
    scale = first["state"]["net.input_quantizer.scale"]
    assert torch.equal(scale, second["state"]["net.input_quantizer.scale"])
    largest = torch.cat([first["data"], second["data"]]).abs().max()
    torch.testing.assert_close(scale, (largest / 127).reshape(1))


def test_what_a_later_hook_makes_is_named(trainer):
    class MadeInTrainStart(Net):
        def on_train_start(self):
            self.factor = 2.0

        def validation_step(self, batch, batch_idx):
            self.log("val", self(self.factor * batch[0]).mean())

    message = (
        r"validation_step fails.*no attribute 'factor'\s+"
        r"self\.factor is made in on_train_start, which Lightning calls later"
    )
    with pytest.raises(CalibrationError, match=message):
        trainer(QAT("w8a8"), num_sanity_val_steps=0).fit(MadeInTrainStart(), loader(), loader(8))


class TwoViews(Net):
    """Trains on two views of a sample, and is validated on one."""

    def training_step(self, batch, batch_idx):
        first, second = batch
        return (self(first) - self(second)).square().mean()

    def validation_step(self, batch, batch_idx):
        (x,) = batch
        self.log("val", self(x).mean())


def test_training_batches_of_another_form_are_named_with_the_remedy(trainer):
    views = DataLoader(TensorDataset(x_of(), x_of(seed=1)), batch_size=8)
    before = Net().state_dict()
    module = TwoViews()
    with pytest.raises(
        CalibrationError, match=r"(?s)TwoViews\.validation_step fails.*too many values.*dataloader=.*calibration_step="
    ):
        trainer(QAT("w8a8")).fit(module, views, loader(8))
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    trainer(QAT("w8a8", dataloader=loader(8))).fit(TwoViews(), views, loader(8))
    trainer(QAT("w8a8", calibration_step=lambda module, batch: module(batch[0]))).fit(TwoViews(), views, loader(8))


def test_errors_of_ones_own_calibration_step_stay_as_they_are(trainer):
    with pytest.raises(ZeroDivisionError):
        trainer(QAT("w8a8", calibration_step=lambda module, batch: 1 / 0)).fit(Net(), loader(), loader(8))


@pytest.mark.parametrize("fn", ["validate", "test"])
def test_loaders_that_are_read_together_have_no_number(fn, trainer):
    class Joint(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val", self(batch["a"][0] if isinstance(batch, dict) else batch[0]).square().mean())

        test_step = validation_step

    joint = CombinedLoader({"a": loader(), "b": loader(16)}, mode="max_size_cycle")
    module = Joint()
    getattr(trainer(PTQ("w8a8", dataloader=loader())), fn)(module, joint, verbose=False)
    assert all(quantizer.is_calibrated for quantizer in quantizers(module))


if __name__ == "__main__":
    module, folder = ReadsItsShare(), Path(sys.argv[1])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    callback = QAT("int8 per_channel / int8 minmax", dataloader=loader())
    fit = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback], **options)
    fit.fit(module)
    data = list(loader())[fit.global_rank][0]
    found = {"made": module.made, "shares": module.shares, "state": module.state_dict(), "data": data}
    torch.save(found, folder / f"{fit.global_rank}.pt")
