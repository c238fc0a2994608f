"""Embedding tables: what is looked up and then quantized is what a lookup in the quantized table gives, gradients
included."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import CalibrationError, calibrate, prepare
from lq_plugin.functional.lookup import Reading
from lq_plugin.native import available, use_native
from lq_plugin.quantizers import sparse_rows
from lq_plugin.quantizers.base import Suspension

BY_ROWS = [
    "int8 per_channel", "int8", "int4 per_channel affine", "int4 affine mse", "int4 per_channel mse",
    "uint4 per_channel affine",
    "int4 group4", "int4 group3 ragged", "int4 group4 mse", "int4 per_channel lsq", "int4 lsq", "int4 per_channel "
    "affine lsq",
    "int4 group4 lsq", "int4 per_channel octav mad", "int4 per_channel mad", "mx6", "mxfp4:rceil",
    "mxfp4:mse", "fp8", "fp8 per_channel",
]  # fmt: skip
BY_TABLE = [
    "int4 group4:4",
    "bwn",
    "bwn:paper per_tensor",
    "sign",
    "twn",
    "ttq",
    "kmeans4",
    "kmeans2:reassign",
    "nvfp4",
    "fp8 block4",
]
INDEX = torch.tensor([[3, 0, 3, 8], [1, 1, 3, 19]])


def table(spec, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 12, **options))
    prepare(net, {"rules": [{"match": "*", "weight": spec}]})
    calibrate(net, [INDEX])
    return net


def gradients(net):
    return {
        name: p.grad.to_dense() if p.grad.is_sparse else p.grad
        for name, p in net.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True, "padding_idx": 1}], ids=str
)
@pytest.mark.parametrize("spec", BY_ROWS)
def test_numbers_and_gradients_are_those_of_the_quantized_table(spec, options, native):
    net = table(spec, **options)
    layer = net[0]
    with torch.no_grad():
        layer.weight.mul_(1.3)  # so that fixed ranges clip
    upstream = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1))
    with use_native(None if native else False):
        reading = Reading(layer.padding_idx, layer.scale_grad_by_freq, layer.sparse)
        assert layer.weight_quantizer.takes_rows(reading) or ("lsq" in spec and layer.scale_grad_by_freq)
        (net.train()(INDEX) * upstream).sum().backward()
        whole = copy.deepcopy(net)
        whole.zero_grad()
        dense = {key: value for key, value in options.items() if key != "sparse"}
        y = F.embedding(INDEX, whole[0].quantized_weight(), **dense)
        (y * upstream).sum().backward()
        assert torch.equal(net(INDEX), y)
        with torch.no_grad():
            assert torch.equal(net.eval()(INDEX), y)
            assert torch.equal(net(INDEX[0, 1]), y[0, 1])
            assert net(INDEX[:0]).shape == (0, 4, 12)
    mine, theirs = gradients(net), gradients(whole)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("spec", [*BY_ROWS, *BY_TABLE, "int4 per_channel stochastic"])
def test_sparse_gradients_stay_sparse_and_equal_the_dense_ones(spec):
    nets = [table(spec, sparse=sparse).train() for sparse in (True, False)]
    for net in nets:
        net(INDEX).square().sum().backward()
    mine, theirs = (net[0].weight.grad for net in nets)
    assert mine.layout == torch.sparse_coo
    torch.testing.assert_close(mine.to_dense(), theirs, rtol=1e-5, atol=1e-6)
    before = nets[0][0].weight.detach().clone()
    torch.optim.SparseAdam([nets[0][0].weight]).step()
    changed = (nets[0][0].weight != before).any(1)
    assert set(changed.nonzero().flatten().tolist()) == set(theirs.any(1).nonzero().flatten().tolist())


@pytest.mark.parametrize("spec", ["int8 per_channel", "int8", "int4 per_channel mse", "mx6"])
def test_only_the_rows_that_are_read_are_quantized(spec, monkeypatch):
    net = table(spec)
    net.eval()(INDEX)  # the one scale of a table is found once

    def never(*arguments):
        raise AssertionError("the whole table is quantized")

    monkeypatch.setattr(type(net[0]), "quantized_weight", never)
    if spec == "int8":
        monkeypatch.setattr(type(net[0].weight_quantizer), "qparams", never)
    assert net(INDEX).shape == (2, 4, 12)


@pytest.mark.parametrize("spec", ["int8", "int4 per_channel mse", "int4 per_channel lsq"])
def test_evaluation_follows_every_change_of_the_table_and_its_ranges(spec):
    net = table(spec).eval()
    quantizer = net[0].weight_quantizer

    def right():
        return torch.equal(net(INDEX), net[0].quantized_weight()[INDEX])

    with torch.no_grad():
        net(INDEX)
        net[0].weight[7] *= 50  # a row that is not read
        assert right()
        net[0].weight.data = torch.randn(20, 12)
        assert right()
        net.load_state_dict({**net.state_dict(), "0.weight": torch.randn(20, 12) * 9})
        assert right()
        if spec != "int8":
            quantizer.scale.mul_(0.5)
            assert right()
            quantizer.set_calibrated(False)
            with pytest.raises(CalibrationError):
                net(INDEX)
            quantizer.set_calibrated()
        quantizer.set_enabled(False)
        assert torch.equal(net(INDEX), net[0].weight[INDEX])
        quantizer.enabled.fill_(True)  # as an average of weights writes to its copy
        assert right()
    net.train()(INDEX).sum().backward()
    net.eval()
    net[0].weight.data.mul_(3)  # autograd does not count what is written past it; a change of mode is noticed
    net.eval()
    assert right()


def test_a_table_waits_with_its_model_for_the_first_ranges():
    net = table("int8 per_channel").eval()
    net[0].weight_quantizer.suspension = Suspension()
    assert torch.equal(net(INDEX), net[0].weight[INDEX])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so
def test_evaluated_in_one_compiled_graph():
    net = table("int8").eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(INDEX), net(INDEX))
            net[0].weight.mul_(2)


def test_before_there_is_a_range_and_while_switched_off():
    net = nn.Sequential(nn.Embedding(20, 12))
    prepare(net, {"rules": [{"match": "*", "weight": "int4 per_channel mse"}]})
    with pytest.raises(CalibrationError, match="no range yet"):
        net.eval()(INDEX)
    calibrate(net, [INDEX])
    net[0].weight_quantizer.set_enabled(False)
    assert torch.equal(net.eval()(INDEX), net[0].weight[INDEX])
    net[0].weight_quantizer.set_enabled(True)
    seen = []
    net[0].weight_quantizer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    net(INDEX)
    assert seen == [(20, 12)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bad", [20, -1])
def test_an_index_that_is_none_raises(bad, native):
    net = table("int4 per_channel mse").eval()
    with use_native(None if native else False), pytest.raises(IndexError, match="out of range"):
        net(torch.tensor([0, bad]))


def test_second_derivatives():
    net = table("int4 per_channel mse").train()
    with torch.no_grad():
        net[0].weight.mul_(1.3)
    outcomes = []
    for y in (net(INDEX), net[0].quantized_weight()[INDEX]):
        (first,) = torch.autograd.grad((y**3).sum(), net[0].weight, create_graph=True)
        outcomes.append(torch.autograd.grad(first.square().sum(), net[0].weight)[0])
    torch.testing.assert_close(*outcomes)
    assert outcomes[0].any()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.3),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.3, foreach=True),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, 0.2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.2),
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
}


def sparse_step(net, optimizer, seed):
    """A step that reads four rows; what was computed, and what the whole table would have given."""
    index = torch.randint(0, 20, (2, 2), generator=torch.Generator().manual_seed(seed))
    y, wanted = net(index), net[0].quantized_weight()[index]
    optimizer.zero_grad()
    (y.square().sum() * (-1) ** seed).backward()
    optimizer.step()
    return torch.equal(y, wanted)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # of torch's Adagrad
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("spec", ["int8", "uint4 affine"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_scale_of_a_table_follows_the_rows_that_sparse_steps_write_to(name, spec, native, monkeypatch):
    """Also where the row that held an extreme lets go of it; the whole table is looked at once alone."""
    looked, extremes = [], sparse_rows.extremes
    monkeypatch.setattr(sparse_rows, "extremes", lambda x, shape: looked.append(len(x)) or extremes(x, shape))
    net = table(spec, sparse=True).train()
    optimizer = OPTIMIZERS[name](net.parameters())
    with use_native(None if native else False):
        assert all(sparse_step(net, optimizer, seed) for seed in range(40))
    assert looked.count(20) == (40 if "momentum" in name else 1)


def test_one_scale_of_a_table_follows_whatever_else_writes_to_it():
    net = table("int8", sparse=True).train()
    weight, other = net[0].weight, torch.nn.Parameter(torch.ones(1))
    optimizer, second = torch.optim.SGD(net.parameters(), 0.3), torch.optim.SGD([other], 0.3)

    def beside_another_step():
        with torch.enable_grad():
            other.square().sum().backward()
        weight.clamp_(-0.5, 0.5)
        second.step()

    writes = [
        lambda: weight.mul_(1.5),
        lambda: weight[5].mul_(40),
        lambda: weight[5].zero_(),
        lambda: net.load_state_dict({**net.state_dict(), "0.weight": torch.randn(20, 12)}),
        lambda: setattr(weight, "data", torch.randn(20, 12)),
        lambda: (net.eval(), weight.data[7].mul_(30), net.train()),
        lambda: weight.data.div_(weight.data.norm(dim=1, keepdim=True)),
        beside_another_step,
    ]
    for seed, write in enumerate(writes):
        assert sparse_step(net, optimizer, seed)
        with torch.no_grad():
            write()
        assert sparse_step(net, optimizer, seed + 100)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].weight_quantizer._rows is None
        assert sparse_step(twin, torch.optim.SGD(twin.parameters(), 0.3), 1)
    assert sparse_step(net, optimizer, 2)


@pytest.mark.parametrize("native", [True, False])
def test_one_scale_of_a_table_with_sparse_gradients_of_other_forms(native):
    """Sparse along both dims, of which the second names columns; and cleared in a hook, after the table was written."""
    net = nn.Sequential(nn.Embedding(20, 200, sparse=True)).train()
    prepare(net, "int8")
    optimizer, weight = torch.optim.SGD(net.parameters(), 0.3), net[0].weight
    with use_native(None if native else False):
        for seed in range(4):
            assert sparse_step(net, optimizer, seed)
            optimizer.zero_grad()
            net(INDEX).square().sum().backward()
            weight.grad = weight.grad.to_dense().to_sparse()
            optimizer.step()
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad(set_to_none=False))
        assert all(sparse_step(net, optimizer, seed) for seed in range(8))


DENSE = OPTIMIZERS | {
    "Adam": lambda p: torch.optim.Adam(p, 0.1),
    "SGD, weight decay": lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.1),
}


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", [name for name in DENSE if name != "SparseAdam"])
def test_one_scale_of_a_table_is_right_with_dense_gradients(name):
    """Also of rows that were not read, and where gradients change without a trace."""
    net = table("int8").train()
    optimizer = DENSE[name](net.parameters())
    assert all(sparse_step(net, optimizer, seed) for seed in range(40))
    weight, first, second = net[0].weight, torch.tensor([[1, 2]]), torch.tensor([[17, 18]])
    for losses in (
        [lambda: net(first).square().sum() + 0.1 * weight.square().sum()],  # all rows are written to
        [lambda: net(first).square().sum(), lambda: 0.1 * weight.square().sum()],
        [lambda: net(first).square().sum() - net(second).square().sum()],
        [lambda: net(first).square().sum(), lambda: -net(second).square().sum()],
        [lambda: net(first).square().sum(), lambda: 0 * torch.nn.utils.clip_grad_norm_([weight], 0.01) + weight.sum()],
    ):
        for _ in range(3):
            optimizer.zero_grad()
            for loss in losses:
                loss().backward()
            optimizer.step()
            assert sparse_step(net, optimizer, 3)
    for _ in range(3):  # as torch.distributed.all_reduce does, and decay by hand
        optimizer.zero_grad()
        net(first).square().sum().backward()
        weight.grad.data.add_(weight.data)
        optimizer.step()
        assert sparse_step(net, optimizer, 3)


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("outside", [10**12, 20, -1, -(10**12)])
def test_an_index_outside_of_a_followed_table(outside):
    net = table("int8", sparse=True).train()
    assert sparse_step(net, torch.optim.SGD(net.parameters(), 0.3), 0)
    with pytest.raises(IndexError):
        net(torch.tensor([[1, outside]]))


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_kernels_do_not_ask_for_the_default_device():
    """A model on the CPU runs there, whatever device new tensors get."""
    nets = table("int8", sparse=False).train(), table("int4 per_channel lsq").train()
    for net in nets:
        wanted = net(INDEX)
        with torch.device("meta"):
            got = net(INDEX)
            got.sum().backward()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("spec", ["int4 per_channel lsq", "int4 group4 affine lsq"])
def test_learned_scales_have_sparse_gradients_where_they_are_wanted(spec, padding_idx):
    nets = [table(spec, sparse=True, padding_idx=padding_idx).train() for _ in range(2)]
    nets[0][0].weight_quantizer.sparse_gradients = True
    for net in nets:
        for _ in range(2):  # they add up
            net(INDEX).square().sum().backward()
    learned = [{name: p.grad for name, p in net.named_parameters() if "quantizer" in name} for net in nets]
    assert len(learned[0]) == (2 if "affine" in spec else 1)
    for name, gradient in learned[0].items():
        assert gradient.is_sparse == available()
        torch.testing.assert_close(gradient.to_dense(), learned[1][name], rtol=1e-5, atol=1e-6)
        assert padding_idx is None or not gradient.to_dense()[padding_idx].any()
    for net in nets:
        torch.optim.SGD(net.parameters(), 0.1).step()
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_a_step_on_a_batch_of_nothing_but_padding(optimizer) -> None:
    net = nn.Sequential(nn.Embedding(10, 16, padding_idx=0, sparse=True))
    prepare(net, "w8 per_tensor")
    calibrate(net, [torch.tensor([[1, 2]])])
    net.train()
    steps = optimizer(net.parameters(), 0.1)
    for batch in ([[1, 2]], [[0, 0]], [[3, 1]]):
        steps.zero_grad()
        net(torch.tensor(batch)).sum().backward()
        steps.step()
    weight = net[0].weight.detach()
    scale = weight.abs().amax() / 127
    assert torch.allclose(net(torch.arange(10)), (weight / scale).round() * scale, atol=1e-6)
