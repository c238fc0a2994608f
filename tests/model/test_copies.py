"""Copies of models that hold what cannot be copied."""

import threading

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lq_plugin import QAT
from lq_plugin.model.copies import copy_model


class Holding(L.LightningModule):
    """Holds a lock, an open file, a generator and a thread's memory, on its own and in containers."""

    def __init__(self, file):
        super().__init__()
        L.seed_everything(0, verbose=False)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.net[0].lock = threading.Lock()
        self.file = file
        self.numbers = (number for number in range(3))
        self.mixed = {"seen": [1], "inner": [threading.local(), "text"]}

    def forward(self, x):
        with self.net[0].lock:
            return self.net(x)

    def training_step(self, x, batch_idx):
        return self(x).square().mean()

    def validation_step(self, x, batch_idx):
        self.log("val", self(x).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture
def module(tmp_path):
    with open(tmp_path / "log.txt", "w") as file:
        yield Holding(file)


def test_what_cannot_be_copied_is_shared_and_nothing_else(module):
    copied = copy_model(module)
    assert copied.net[0].lock is module.net[0].lock
    assert copied.file is module.file
    assert copied.numbers is module.numbers
    assert copied.mixed["inner"][0] is module.mixed["inner"][0]
    assert copied.mixed is not module.mixed
    assert copied.mixed["seen"] is not module.mixed["seen"]
    for mine, theirs in zip(copied.parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    with torch.no_grad():
        copied.net[0].weight.zero_()
    assert module.net[0].weight.any()


def test_a_copy_belongs_to_no_trainer(module):
    module._trainer = trainer = object()
    assert copy_model(module)._trainer is None
    assert module._trainer is trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_such_a_module_learns_from_its_float_copy(module):
    data = DataLoader(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), batch_size=8)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[QAT("w4a8", distill=0.5)], **quiet).fit(module, data, data)
    assert module.trainer.callback_metrics["quant/distillation"] > 0
