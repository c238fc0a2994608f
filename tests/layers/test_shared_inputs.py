"""Layers that read one tensor quantize it once, and nothing else changes."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lq_plugin import QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.layers import kept_input, unshare_inputs
from lq_plugin.layers.integer import enable_integer_forward
from lq_plugin.layers.integer.kernels import IntegerKernels, integer_kernels
from lq_plugin.model.prepare import quantized_layers, quantizers
from lq_plugin.model.training import commit_observers
from lq_plugin.native import use_native
from lq_plugin.quantizers import activation, base, shared_input as shared

WIDTH = 24
needs_kernels = pytest.mark.skipif(isinstance(integer_kernels(), str), reason=str(integer_kernels()))


class Attention(nn.Module):
    """Queries, keys and values by three layers, as Hugging Face's models have them."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.checkpointed = checkpointed

    def projections(self, x, memory):
        return self.query(x), self.key(memory), self.value(memory)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        parts = (x, memory)
        q, k, v = (
            checkpoint(self.projections, *parts, use_reentrant=False) if self.checkpointed else self.projections(*parts)
        )
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class Two(nn.Module):
    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        self.first, self.second = Attention(checkpointed == "inside"), Attention(checkpointed == "inside")
        self.outside = checkpointed == "outside"

    def forward(self, x):
        x = torch.tanh(x)
        if self.outside:
            return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), x, use_reentrant=False)
        return self.second(self.first(x), x)


def ready(net, plan="w8a8"):
    torch.manual_seed(1)
    x = torch.randn(3, 5, WIDTH)
    prepare(net, plan)
    calibrate(net, [x])
    for _, layer in quantized_layers(net):
        if layer.input_quantizer is not None:
            layer.input_quantizer.observing = True
    return net.train()


def step(net, x):
    """Output, gradients and the ranges afterwards."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    commit_observers(quantizers(net))
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.fixture
def counted(monkeypatch):
    """Counts the tensors of activations that are quantized."""
    calls = SimpleNamespace(count=0)

    def counting(module, name):
        before = getattr(module, name)

        def run(x, *args):
            calls.count += 1
            return before(x, *args)

        monkeypatch.setattr(module, name, run)

    counting(activation, "fake_quantize_observed")
    counting(activation, "fake_quantize")
    rounded = base.Quantizer.rounded

    def counting_rounded(self, x, *args):
        calls.count += 1
        return rounded(self, x, *args)

    monkeypatch.setattr(base.Quantizer, "rounded", counting_rounded)
    once = kept_input._Rounding.once

    def counting_once(self, x, *args):
        calls.count += 1
        return once(self, x, *args)

    monkeypatch.setattr(kept_input._Rounding, "once", counting_once)
    return calls


def alone(net):
    """Returns a copy of the model whose layers share nothing."""
    net = copy.deepcopy(net)
    unshare_inputs(net)
    return net


@pytest.mark.parametrize("native", [True, False])
def test_one_quantization_for_three_layers(counted, native):
    torch.manual_seed(0)
    net = ready(Two())
    plain = alone(net)
    x = torch.randn(3, 5, WIDTH)
    with use_native(native):
        for _ in range(3):
            counted.count = 0
            want = step(plain, x)
            # Inputs alone: weights with ranges that follow them take another way.
            assert counted.count == 8
            counted.count = 0
            got = step(net, x)
            # Of the second attention the query's input is another one than that of key and value.
            assert counted.count == 2 + 3
            assert len(got) == len(want) > 20
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)


def test_ranges_move_as_without(counted):
    """Ranges after steps on other data are those of layers that share nothing, bit for bit."""
    net = ready(Two())
    plain = alone(net)
    for seed in range(4):
        x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        step(net, x)
        step(plain, x)
    assert counted.count == 4 * (5 + 8)
    for ours, theirs in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_in_evaluation(counted):
    net = ready(Two()).eval()
    x = torch.randn(3, 5, WIDTH)
    want = alone(net)(x)
    counted.count = 0
    with torch.no_grad():
        assert torch.equal(net(x), want)
        assert counted.count == 5
        # Changes of a tensor cannot be told there.
        with torch.inference_mode():
            assert torch.equal(net(x), want)
        assert counted.count == 5 + 8


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_gradient_checkpointing(where):
    """Both runs of a checkpoint save the same tensors, and the gradients are those without one."""
    torch.manual_seed(0)
    net = Two()
    other = Two(where)
    other.load_state_dict(net.state_dict())
    ready(net)
    ready(other)
    x = torch.randn(3, 5, WIDTH)
    for ours, theirs in zip(step(other, x), step(net, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Changed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        with torch.no_grad():
            y = x.clone()
            first = self.a(y)
            y.mul_(0.5)
            return first + self.b(y)


def test_a_tensor_changed_in_place_is_quantized_anew():
    torch.manual_seed(0)
    net = ready(Changed())
    # The ranges found on the tensor before and after would tell the two apart.
    net.b.input_quantizer.load_state_dict(net.a.input_quantizer.state_dict())
    x = torch.randn(3, 5, WIDTH)
    assert torch.equal(net(x), alone(net)(x))


@pytest.mark.parametrize(
    "rules",
    [
        [Rule("*", weight="int8 per_channel", input="uint8 affine"), Rule("*key", input="uint4 affine")],
        [Rule("*", weight="int8 per_channel", input="uint8 affine"), Rule("*key", input="float")],
        [Rule("*", weight="int8 per_channel", input="uint8 affine"), Rule("*key", input="uint8 affine percentile:90")],
        [Rule("*", weight="int8 per_channel", input="uint8 affine per_channel")],
        [Rule("*", weight="mx6", input="mx6")],
        [Rule("*", weight="int4 per_channel lsq", input="uint4 affine lsq")],
        [Rule("*", weight="int8 per_channel", input="uint8 affine stochastic")],
    ],
    ids=lambda rules: " ".join(str(rule.input) for rule in rules),
)
def test_other_specs_are_not_mixed_up(rules):
    torch.manual_seed(0)
    net = ready(Two(), QuantPlan(rules))
    plain = alone(net)
    x = torch.randn(3, 5, WIDTH)
    for ours, theirs in zip(step(net, x), step(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_older_torch_shares_nothing(counted, monkeypatch):
    """It does not tell where a checkpoint begins."""
    monkeypatch.setattr(shared, "_top_hooks", None)
    net = ready(Two("inside"))
    counted.count = 0
    step(net, torch.randn(3, 5, WIDTH))
    assert counted.count == 2 * 6 + 2


@needs_kernels
def test_levels_are_shared_too(monkeypatch):
    """Summed with integers: one array of bytes for three layers, the same output, gradients and ranges; and in trials
    nothing is."""
    torch.manual_seed(0)
    net = ready(Two(), "w7a8")
    plain = alone(net)
    x = torch.randn(3, 5, WIDTH)
    count, quantize = [], IntegerKernels.quantize
    monkeypatch.setattr(IntegerKernels, "quantize", lambda *args: count.append(1) or quantize(*args))
    want = step(copy.deepcopy(plain), x)
    for choices, calls in ((True, 5), (None, 8 * 4)):
        for model in (net, plain):
            enable_integer_forward(model, choices)
        theirs, ours = step(copy.deepcopy(plain), x), []
        count.clear()
        ours = step(copy.deepcopy(net), x)
        assert len(count) == calls
        for mine, other, fake in zip(ours, theirs, want, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine, fake, rtol=1e-4, atol=1e-5)


def test_who_watches_a_quantizer_sees_every_call(counted):
    net = ready(Two())
    seen = []
    net.first.value.input_quantizer.register_forward_hook(lambda module, args, output: seen.append(output))
    net(torch.randn(3, 5, WIDTH))
    assert len(seen) == 1
    assert counted.count == 6


def test_nothing_is_held_afterwards():
    """Neither after a forward pass nor after one that raised, and copies begin empty."""
    net = ready(Two())
    held = net.first.query._shared_input
    assert held is net.first.key._shared_input is not net.second.query._shared_input
    net(torch.randn(3, 5, WIDTH))
    assert held._entry is None
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net.first(torch.randn(3, 5, WIDTH), torch.randn(3, 5, 7))
    assert held._entry is None
    assert held._depth == 0
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.first.query._shared_input is twin.first.key._shared_input is not held
        hook = next(iter(twin.first._forward_pre_hooks.values()))
        assert hook.__self__ is twin.first.query._shared_input


def test_removed_without_a_trace():
    net = Two()
    hooks = {name: (dict(m._forward_pre_hooks), dict(m._forward_hooks)) for name, m in net.named_modules()}
    prepare(net, "w8a8")
    prepare(net, "w8a8")
    assert len(net.first._forward_pre_hooks) == 1
    remove(net)
    assert hooks == {name: (dict(m._forward_pre_hooks), dict(m._forward_hooks)) for name, m in net.named_modules()}
    assert not net.first._forward_hooks_always_called
    assert not any("shared_input" in module.__dict__ for module in net.modules())
