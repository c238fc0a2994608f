"""Training sees the batches of the float run, whatever the loaders are made of: calibration gives back what it has
read."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lq_plugin import QAT
from lq_plugin.errors import CalibrationError
from tests.callbacks.conftest import Data, Module

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None"),
]


class Sees(Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].sum().item())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        batch[0].zero_()  # what calibration reads is its own


class Noisy(Dataset):
    def __init__(self, data):
        self.data, self.rng = data, np.random.default_rng(4)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + float(self.rng.random()), y


class ReadsOn(IterableDataset):
    def __init__(self, data):
        self.items = iter([data[index] for index in range(len(data))])

    def __iter__(self):
        for x, y in self.items:
            yield x.clone(), y


class Holds(L.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


class Counts(Holds):
    """Gives the data of the next stage at each call, as a curriculum does."""

    calls = 0

    def train_dataloader(self):
        self.calls += 1
        return DataLoader(self.loader, 16, shuffle=True, generator=torch.Generator().manual_seed(self.calls))


def generator():
    return torch.Generator().manual_seed(7)


def before_each(data):
    return [item for batch in DataLoader(data, batch_size=16) for item in (None, batch)]


SOURCES = {
    "global seed": lambda d: DataLoader(d, batch_size=16, shuffle=True),
    "generator of the loader": lambda d: DataLoader(d, batch_size=16, shuffle=True, generator=generator()),
    "generator of the sampler": lambda d: DataLoader(d, batch_size=16, sampler=RandomSampler(d, generator=generator())),
    "numpy in the data set": lambda d: DataLoader(Noisy(d), batch_size=16),
    "a generator of batches": lambda d: (batch for batch in list(DataLoader(d, batch_size=16))),
    "a data set that reads on": lambda d: DataLoader(ReadsOn(d), batch_size=16),
    "None before each batch": lambda d: DataLoader(before_each(d), batch_size=None, collate_fn=copy.deepcopy),
    "a generator that a datamodule holds": lambda d: Holds(batch for batch in list(DataLoader(d, batch_size=16))),
    "a datamodule that counts its calls": Counts,
}


def fit(trainer, source, *callbacks):
    torch.manual_seed(0)
    module = Sees()
    data = Data()
    loaders = SOURCES[source](TensorDataset(data.x[:64].clone(), data.y[:64]))
    trainer(*callbacks, num_sanity_val_steps=0, limit_val_batches=0, max_epochs=1).fit(module, loaders)
    return module.seen


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batches", [1, 3])
def test_the_float_runs_batches(source, batches, trainer):
    wanted = fit(trainer, source)
    assert len(wanted) == 4
    assert fit(trainer, source, QAT("w8a8", init_batches=batches)) == wanted


def test_an_iterator_that_nothing_can_stand_in_for_is_refused(trainer):
    data = Data()
    batches = (batch for batch in DataLoader(TensorDataset(data.x, data.y), batch_size=16))

    class Global(Sees):
        def train_dataloader(self):
            return batches

    quiet = {"limit_val_batches": 0, "max_epochs": 1}
    with pytest.raises(CalibrationError, match=r"generator, which can be read once.*QAT\(plan, dataloader=\.\.\.\)"):
        trainer(QAT("w8a8"), **quiet).fit(Global())
    module = Global()
    trainer(QAT("w8a8", dataloader=data.train_dataloader()), **quiet).fit(module)
    assert len(module.seen) == 6


def test_iterators_in_a_dict_are_several_loaders_as_the_trainer_reads_them(trainer):
    batches = list(Data().train_dataloader())
    with pytest.raises(
        CalibrationError, match=r"batches of one loader, train_dataloader gives 2.*QAT\(plan, dataloader=\.\.\.\)"
    ):
        trainer(QAT("w8a8"), limit_val_batches=0).fit(Module(), {"a": iter(batches), "b": iter(batches)})
