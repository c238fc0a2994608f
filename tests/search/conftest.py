from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer, seed_everything

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule

from .server import Server, postgresql

CPU = partial(Trainer, accelerator="cpu", devices=1)


@pytest.fixture(scope="session")
def trained() -> DigitsCNN:
    """A small CNN after three epochs: good enough for plans to differ. Tests get copies of it."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    model = DigitsCNN(width=8)
    trainer = CPU(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, datamodule=DigitsDataModule())
    return model


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """PostgreSQL."""
    with postgresql() as running:
        yield running


@pytest.fixture
def model(trained: DigitsCNN) -> DigitsCNN:
    fresh = DigitsCNN(width=8)
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
    return fresh


@pytest.fixture
def datamodule() -> DigitsDataModule:
    return DigitsDataModule(batch_size=120)


@pytest.fixture(autouse=True)
def no_hydra_job() -> Iterator[None]:
    """A test that stands in for a Hydra job leaves nothing of it to the next one."""
    yield
    HydraConfig.instance().cfg = None
