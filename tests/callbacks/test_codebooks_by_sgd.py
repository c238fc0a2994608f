"""Codebooks under SGD at the usual rates: a trained network is kept, while the summed gradient ruins it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lightning import Trainer, seed_everything

from lq_plugin import QAT, QuantPlan, Rule
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule, trained_cnn


@pytest.fixture(scope="module")
def network() -> DigitsCNN:
    return trained_cnn(4)


def _sgd(model: DigitsCNN, lr: float) -> torch.optim.SGD:
    """Called when the codebooks are among the parameters."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def tuned(network: DigitsCNN, spec: str, lr: float) -> float:
    """Accuracy on the validation data after two epochs of SGD."""
    model = copy.deepcopy(network)
    seed_everything(0, verbose=False)
    model.configure_optimizers = partial(_sgd, model, lr)  # type: ignore[method-assign]
    trainer = Trainer(
        max_epochs=2, callbacks=[QAT(QuantPlan([Rule("*", weight=spec)]))], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, DigitsDataModule())
    (scores,) = trainer.validate(model, DigitsDataModule(), verbose=False)
    return float(scores["val/acc"])


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.01, 0.05])
def test_a_trained_network_is_kept(network: DigitsCNN, lr: float) -> None:
    assert tuned(network, "kmeans2", lr) >= 0.97
    assert tuned(network, "kmeans2:sum", lr) < 0.9, "the summed gradient is thousands of times larger"
