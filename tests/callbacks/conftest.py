"""A small LightningModule and data for callback tests."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = x + torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Module(L.LightningModule):
    """`where` is the hook that builds the layers; `optimizers` a function of the module."""

    def __init__(self, where="init", optimizers=None):
        super().__init__()
        self.where, self.make_optimizers = where, optimizers
        self.accuracy = MulticlassAccuracy(4)
        self.net = Net() if where == "init" else None

    def setup(self, stage):
        if self.where == "setup" and self.net is None:
            self.net = Net()

    def configure_model(self):
        if self.where == "configure_model" and self.net is None:
            self.net = Net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.accuracy(out, batch[1])
        self.log("val/loss", nn.functional.cross_entropy(out, batch[1]))
        self.log("val/acc", self.accuracy)

    def configure_optimizers(self):
        if self.make_optimizers is not None:
            return self.make_optimizers(self)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


class ResumableLoader:
    """Batches in order, continued where a checkpoint was written, as torchdata's StatefulDataLoader does."""

    def __init__(self, batches):
        self.batches, self.position, self.resumed = batches, 0, False

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start = self.position if self.resumed else 0
        self.resumed = False
        for index in range(start, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position, self.resumed = state["position"] % len(self.batches), True


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(96, 1, 6, 6, generator=generator)
        self.y = torch.randint(0, 4, (96,), generator=generator)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x[:64], self.y[:64]), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[64:], self.y[64:]), batch_size=self.batch_size)


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 2,
        }
        return L.Trainer(callbacks=list(callbacks), **(defaults | options))

    return make


@pytest.fixture
def module():
    L.seed_everything(0, verbose=False)
    return Module()


@pytest.fixture
def data():
    return Data()
