"""Quantizers follow the buffers that switch them, whoever writes to them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lq_plugin import calibrate, prepare
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.model.training import enter_stage

PLAN = {
    "rules": [
        {"match": "*", "weight": "int8 per_channel", "input": "uint4 affine ema"},
        {"match": "0", "weight": "int2 per_channel mse", "start": "epoch 1"},
    ]
}
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    prepare(net, PLAN)
    return net.eval()


def stage(net, epoch):
    enter_stage([layer for _, layer in quantized_layers(net)], epoch, 0, calibrate=True)


def averaged_in_place(copied, net):
    with torch.no_grad():
        for mine, other in zip(copied.state_dict().values(), net.state_dict().values(), strict=True):
            mine.copy_(other)


def past_the_count(copied, net):
    for mine, other in zip((*copied.parameters(), *copied.buffers()), (*net.parameters(), *net.buffers()), strict=True):
        mine.data.copy_(other.data)
    copied.eval()


def in_inference_mode(copied, net):
    with torch.inference_mode():
        averaged_in_place(copied, net)


WAYS = {
    "averaged in place": averaged_in_place,
    "loaded": lambda copied, net: copied.load_state_dict(net.state_dict()),
    "loaded by assignment": lambda copied, net: copied.load_state_dict(copy.deepcopy(net.state_dict()), assign=True),
    "through .data, then eval()": past_the_count,
    "in inference mode": in_inference_mode,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_what_its_state_says(way):
    net = model()
    stage(net, 0)
    copied = copy.deepcopy(net)  # without ranges, in the first stage
    calibrate(net, [X])
    WAYS[way](copied, net)
    assert torch.equal(copied(X), net(X))
    stage(net, 1)
    for quantizer in quantizers(net):
        if quantizer.name.endswith("input"):
            quantizer.set_enabled(False)
    later = net(X)
    assert not torch.equal(copied(X), later)
    WAYS[way](copied, net)
    assert torch.equal(copied(X), later)
    assert [q.is_enabled for q in quantizers(copied)] == [q.is_enabled for q in quantizers(net)]


def test_copies_that_were_written_to_as_often_as_the_model():
    """Counts of writes start anew in a copy: equal ones say nothing."""
    net = model()
    calibrate(net, [X])
    chosen = quantizers(net)
    for writes in range(6):
        copied = pickle.loads(pickle.dumps(net)) if writes % 2 else copy.deepcopy(net)
        for quantizer in quantizers(copied):
            for _ in range(writes):
                quantizer.enabled.fill_(True)
            quantizer.enabled.fill_(False)
        assert not any(quantizer.is_enabled for quantizer in quantizers(copied)), writes
        assert all(quantizer.is_enabled for quantizer in chosen)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torchs_averaged_model(use_buffers):
    net = model()
    stage(net, 0)
    average = AveragedModel(net, avg_fn=lambda mine, new, count: new.clone(), use_buffers=use_buffers).eval()
    calibrate(net, [X])
    stage(net, 1)
    average.update_parameters(net)
    assert torch.equal(average(X), net(X))


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        net = model()
        calibrate(net, [X])
        before = net(X)
        for quantizer in quantizers(net):
            quantizer.enabled.fill_(False)
        assert not torch.equal(net(X), before)


def test_fixed_qparams():
    net = model()
    calibrate(net, [X])
    copied = copy.deepcopy(net)
    quantizer = net[2].weight_quantizer
    quantizer.fix(torch.full_like(quantizer.scale, 0.1), torch.zeros_like(quantizer.zero_point))
    for mine, other in zip(copied.buffers(), net.buffers(), strict=True):
        mine.copy_(other)
    assert copied[2].weight_quantizer.is_fixed
    assert torch.equal(copied(X), net(X))
    assert copied.state_dict().keys() == net.state_dict().keys()


def test_nothing_is_read_while_nobody_writes(monkeypatch):
    net = model()
    calibrate(net, [X])
    net(X)
    read = []
    for quantizer in quantizers(net):
        monkeypatch.setattr(quantizer, "_read_switches", lambda name=quantizer.name: read.append(name))
    net.train()
    for quantizer in quantizers(net):
        quantizer.set_enabled(False)
        quantizer.set_enabled(True)
    net(X)
    assert read == []
    quantizers(net)[0].enabled.fill_(True)
    net(X)
    assert set(read) == {quantizers(net)[0].name}
