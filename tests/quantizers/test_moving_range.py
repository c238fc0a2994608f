"""The range that follows training batches, and noise of stochastic rounding, against hand computation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers import make_activation_quantizer, make_weight_quantizer
from lq_plugin.ranges import Sample


def quantizer(spec):
    return make_activation_quantizer(QuantSpec.parse(spec), "layer.input", 4, -1).train()


def seen(q, high):
    q.commit(torch.tensor([-1.0]), torch.tensor([high]))
    return q.running_max.item()


def test_a_constant_momentum_holds_from_the_second_batch_on():
    q = quantizer("uint8 affine ema:0.75:constant")
    assert seen(q, 8.0) == 8.0  # the first batch is the range
    assert seen(q, 4.0) == pytest.approx(0.75 * 8 + 0.25 * 4)
    assert seen(q, 1.0) == pytest.approx(0.75 * 7 + 0.25 * 1)
    assert q.scale.item() == pytest.approx((q.running_max.item() + 1.0) / 255)


def test_the_momentum_grows_without_the_word():
    q = quantizer("uint8 affine ema:0.99")
    assert seen(q, 8.0) == 8.0
    assert seen(q, 4.0) == pytest.approx(0.1 * 8 + 0.9 * 4)  # (1 + 0) / (10 + 0)
    assert seen(q, 1.0) == pytest.approx(2 / 11 * 4.4 + 9 / 11 * 1)


@pytest.mark.parametrize(("spec", "weight"), [("uint8 affine ema", 9 / 100), ("uint8 affine ema:0.99:constant", 0.01)])
def test_the_first_batch_does_not_forget_the_calibration(spec, weight):
    q = quantizer(spec)
    q.load_sample(Sample.from_tensor(torch.tensor([[-1.0, 0.0, 10.0]])))
    assert seen(q, 0.0) == pytest.approx((1 - weight) * 10.0)


@pytest.mark.parametrize("spec", ["uint8 affine stochastic", "sign stochastic"])
def test_noise_of_inputs_differs_by_call_and_by_rank_and_is_repeated_by_checkpointing(spec, monkeypatch):
    q = quantizer(spec)
    if q.needs_calibration:
        q.load_sample(Sample.from_tensor(torch.tensor([[-1.0, 1.0]])))
    x = torch.linspace(-1, 1, 400)
    first = q(x)
    assert torch.equal(first, q(x))  # the same call again
    assert not torch.equal(q.noise(x), q.noise(x * 1.5))  # a second call of a shared layer
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(q.noise(x))
    assert not torch.equal(*parts)
    monkeypatch.undo()
    leaf = x.clone().requires_grad_()
    runs = []
    checkpoint(lambda t: runs.append(q(t)) or runs[-1] * t, leaf, use_reentrant=False).sum().backward()
    assert len(runs) == 2
    assert torch.equal(*runs)


def test_noise_of_weights_is_the_same_on_all_ranks(monkeypatch):
    q = make_weight_quantizer(QuantSpec.parse("int4 stochastic"), "layer.weight", (4, 4)).train()
    w = torch.randn(4, 4)
    alone = q.noise(w)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert torch.equal(alone, q.noise(w))
