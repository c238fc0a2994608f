"""Codebooks in training: what an optimizer makes of their centroids."""

import copy
import itertools

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QAT, QuantSpec, calibrate, prepare
from lq_plugin.demo.digits import DigitsDataModule, trained_cnn
from lq_plugin.errors import SpecError
from lq_plugin.export import load_packed, save_packed


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


@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 3), lambda: nn.Conv2d(16, 2, 3)])
def test_each_group_has_the_codebook_of_its_own_weights(make, tmp_path):
    """Optimal cuts of each eight weights of a channel, found by trying all of them; the file holds the same."""
    torch.manual_seed(0)
    net = nn.Sequential(make())
    prepare(net, {"rules": [{"match": "*", "weight": "kmeans1 group8"}]})
    weight = net[0].weight.detach().clone()
    calibrate(net, [torch.zeros(1, *weight.shape[1:])])
    found = net[0].quantized_weight().detach()
    places = itertools.product(range(weight.shape[0]), range(0, weight.shape[1], 8), np.ndindex(*weight.shape[2:]))
    for row, start, kernel in places:
        members = (row, slice(start, start + 8), *kernel)
        ordered, order = weight[members].double().sort()
        cuts = [(ordered[:cut].mean(), ordered[cut:].mean(), cut) for cut in range(1, 8)]
        low, high, cut = min(
            cuts, key=lambda c: float((ordered[: c[2]] - c[0]).square().sum() + (ordered[c[2] :] - c[1]).square().sum())
        )
        want = torch.empty(8, dtype=torch.float64)
        want[order[:cut]], want[order[cut:]] = low, high
        torch.testing.assert_close(found[members].double(), want, rtol=1e-6, atol=1e-6)
    save_packed(net, tmp_path / "net.safetensors")
    other = nn.Sequential(make())
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other[0].quantized_weight(), found)


def test_a_codebook_has_no_shorter_last_group():
    with pytest.raises(SpecError, match="a codebook for each whole group"):
        QuantSpec.parse("kmeans2 group16 ragged")
