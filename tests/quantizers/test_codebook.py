"""Codebooks in training: what an optimizer makes of their centroids."""

import copy

import lightning
import pytest
import torch
from torch import nn

from lq_plugin import QAT, calibrate, prepare
from lq_plugin.demo.digits import DigitsDataModule, trained_cnn


def test_the_spec_chooses_the_gradient():
    """A sum over the 64 members of a table of one number is 64 times their mean."""
    slopes = {}
    for spec in ("kmeans1", "kmeans1:mean", "kmeans1:sum", "kmeans1:reassign", "kmeans1:sum:reassign"):
        net = nn.Sequential(nn.Linear(8, 8, bias=False))
        net[0].weight.data = torch.ones(8, 8)
        prepare(net, {"rules": [{"match": "*", "weight": spec}]})
        calibrate(net, [torch.zeros(1, 8)])
        net.train()(torch.ones(1, 8)).sum().backward()
        slopes[spec] = net[0].weight_quantizer.centroids.grad.abs().max().item()
    assert slopes == {
        "kmeans1": 1,
        "kmeans1:mean": 1,
        "kmeans1:sum": 64,
        "kmeans1:reassign": 1,
        "kmeans1:sum:reassign": 64,
    }


@pytest.fixture(scope="module")
def trained_net():
    return trained_cnn(4)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["kmeans2", "kmeans2:reassign"])
@pytest.mark.parametrize("lr", [0.01, 0.05])
def test_sgd_at_the_rate_of_the_weights_keeps_the_accuracy(trained_net, lr, spec):
    lightning.seed_everything(0, verbose=False)
    net = copy.deepcopy(trained_net)
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[QAT({"rules": [{"match": "*", "weight": spec}]})], **quiet
    )
    trainer.fit(net, DigitsDataModule())
    assert trainer.validate(net, DigitsDataModule(), verbose=False)[0]["val/acc"] >= 0.97
