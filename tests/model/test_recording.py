"""Producers and consumers against graphs known from the code of the models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lq_plugin.errors import QuantizationError
from lq_plugin.model.graph.record import Recording, record
from tests.models import BasicBlock, Function, MobileNet, SharedConv, TwoConsumers, resnet20


def run(model: nn.Module, *inputs, **kwargs) -> Recording:
    with torch.no_grad():
        return record(model.eval(), lambda: model(*inputs, **kwargs))


def names(calls) -> list[str]:
    return [call.name for call in calls]


def test_resnet_graph():
    recording = run(resnet20(4), torch.randn(2, 3, 32, 32))
    assert recording.producer_of("conv1") is None  # the model's input
    assert recording.producer_of("bn1").name == "conv1"
    assert recording.producer_of("layer1.0.bn2").name == "layer1.0.conv2"
    # += : the sum is a new value, and bn2's output feeds the sum alone.
    assert names(recording.consumers_of("layer1.0.bn2")) == ["layer1.0.add_0"]
    assert names(recording.consumers_of("layer1.0.add_0")) == ["layer1.0.relu_1"]
    assert recording.producer_of("linear").op == "adaptive_avg_pool2d"
    assert recording.consumers_of("linear")[0].kind == "output"
    assert recording.following_activation("bn1").name == "relu_0"
    assert recording.following_activation("layer1.0.bn1").name == "layer1.0.relu_0"
    assert recording.following_activation("layer1.0.bn2") is None
    assert recording.following_activation("layer1.0.add_0").op == "relu"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_place_modules_make_new_values(context):
    model, x = MobileNet().eval(), torch.randn(2, 3, 16, 16)
    with context():
        recording = record(model, lambda: model(x))
    assert recording.following_activation("stem.1").name == "stem.2"
    assert recording.producer_of("blocks.0.conv.0").name == "stem.2"
    assert names(recording.consumers_of("stem.2")) == ["blocks.0.conv.0", "blocks.0.add_0"]
    assert names(recording.consumers_of("stem.1")) == ["stem.2"]


def test_in_place_function_after_a_view_changes_the_base():
    def forward(m, x):
        y = m.a(x)
        y.view(-1).relu_()
        return m.b(y)

    recording = run(Function(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4))
    assert recording.producer_of("b").op == "relu"
    assert names(recording.consumers_of("a")) == ["relu_0"]


def test_in_place_leaf_without_an_inplace_flag_is_found_by_version():
    class Halve(nn.Module):
        def forward(self, x):
            x.mul_(0.5)
            return x

    model = nn.Sequential(nn.Linear(4, 4), Halve(), nn.Linear(4, 4))
    with torch.no_grad():
        recording = record(model, lambda: model(torch.randn(2, 4)), is_leaf=lambda m: not isinstance(m, nn.Sequential))
    assert recording.producer_of("2").name == "1"


def test_views_and_copies_pass_the_producer_through():
    def forward(m, x):
        y = m.a(x)
        return m.b(y.reshape(2, 2, 2).permute(0, 2, 1).contiguous().flatten(1).float()[:, :4].clone())

    recording = run(Function(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4))
    assert recording.producer_of("b").name == "a"
    assert not recording.calls_of("b")[0].inputs[0].direct
    assert names(recording.consumers_of("a")) == ["b"]


def test_passthrough_modules_are_no_consumers():
    recording = run(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2)),
        torch.randn(2, 3, 5, 5),
    )
    assert recording.producer_of("4").name == "0"
    assert names(recording.consumers_of("0")) == ["4"]
    assert names(recording.module_calls) == list("01234")


def test_two_consumers_and_the_model_output():
    assert names(run(TwoConsumers(), torch.randn(1, 8, 4, 4)).consumers_of("conv")) == ["bn", "add_0"]
    model = Function(lambda m, x: {"features": (y := m.a(x)), "logits": [m.b(y)]}, a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    recording = run(model, torch.randn(1, 2))
    assert [c.kind for c in recording.consumers_of("a")] == ["module", "output"]


@pytest.mark.parametrize("return_it", [True, False])
def test_output_is_seen_whether_or_not_run_returns_it(return_it: bool):
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    x = torch.randn(1, 2)
    with torch.no_grad():
        recording = record(model, lambda: model(x) if return_it else (model(x), None)[1])
    assert [c.kind for c in recording.consumers_of("0")] == ["output"]


def test_reading_out_a_value_counts_as_consumer_and_reading_its_shape_does_not():
    def forward(m, x):
        y = m.a(x)
        assert y.shape[0] == len(y) == y.size(0) == 1
        assert torch.zeros_like(y).device == y.device
        if m.peek:
            y.tolist()
        return m.b(y)

    model = Function(forward, a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    model.peek = False
    assert names(run(model, torch.randn(1, 2)).consumers_of("a")) == ["b"]
    model.peek = True
    assert names(run(model, torch.randn(1, 2)).consumers_of("a")) == ["tolist_0", "b"]


def test_shared_modules_are_called_twice_under_one_name():
    recording = run(SharedConv(), torch.randn(1, 8, 4, 4))
    first, second = recording.calls_of("conv")
    assert (first.repeat, second.repeat) == (0, 1)
    assert recording.producer_of(second).op == "relu"
    assert names(recording.consumers_of(second)) == ["bn2"]
    assert recording.macs["conv"] == 2 * first.macs
    with pytest.raises(QuantizationError, match=r"called 2 times"):
        recording.producer_of("conv")
    block = BasicBlock(4, 4, 1)
    recording = run(nn.Sequential(block, block), torch.randn(1, 4, 4, 4))
    # A shared block: its add is one place in the code that ran twice.
    assert names(recording.functional_calls) == ["0.add_0", "0.add_0"]
    assert [c.repeat for c in recording.functional_calls] == [0, 1]
    assert recording.following_activation("0.add_0").op == "relu"


def test_freed_tensors_do_not_lend_their_identity():
    """Without references held, the allocator hands the same object ids and addresses out again."""

    def forward(m, x):
        out = []
        for i in range(20):
            y = m.a(x)
            del y
            out.append(m.b(torch.relu(x * i)))
        return out

    def outside(m, x):
        for _ in range(20):
            y = m.a(x)
            del y
            m.b(torch.from_numpy(np.ones((2, 4), np.float32)))  # arrives without a call that is seen

    for function, producers in ((forward, {"relu"}), (outside, {None})):
        recording = run(Function(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4))
        assert {getattr(recording.producer_of(call), "op", None) for call in recording.calls_of("b")} == producers
        assert all(recording.consumers_of(call) == () for call in recording.calls_of("a"))


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


def test_dataclass_outputs_between_modules():
    inner = Function(lambda m, x: Output(m.a(x), (m.b(x),)), a=nn.Linear(2, 2), b=nn.Linear(2, 3))
    model = Function(lambda m, x: m.c(m.inner(x).hidden[0]), inner=inner, c=nn.Linear(3, 1))
    recording = run(model, torch.randn(1, 2))
    assert recording.producer_of("c").name == "inner.b"
    assert recording.consumers_of("inner.a") == ()
    wrapped = Function(lambda m, x: Output(m.a(x), ()), a=nn.Linear(2, 2))
    assert [c.kind for c in run(wrapped, torch.randn(1, 2)).consumers_of("a")] == ["output"]


def test_tuple_outputs_are_told_apart():
    def forward(m, x):
        sequence, (hidden, _) = m.rnn(x)
        return m.head(sequence) + m.state(hidden[0])

    model = Function(forward, rnn=nn.LSTM(4, 6), head=nn.Linear(6, 2), state=nn.Linear(6, 2))
    recording = run(model, torch.randn(3, 2, 4))
    assert recording.calls_of("rnn")[0].output_shapes == ((3, 2, 6), (1, 2, 6), (1, 2, 6))
    assert names(recording.consumers_of("rnn", 0)) == ["head"]
    assert names(recording.consumers_of("rnn", 1)) == ["state"]
    assert recording.consumers_of("rnn", 2) == ()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_custom_autograd_functions_are_seen():
    model = Function(
        lambda m, x: m.b(y) + Double.apply(y) if (y := m.a(x)) is not None else None,
        a=nn.Linear(2, 2),
        b=nn.Linear(2, 2),
    )
    assert len(run(model, torch.randn(1, 2)).consumers_of("a")) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_seen(reentrant: bool):
    model = Function(lambda m, x: checkpoint(lambda t: m.a(t) + t, x, use_reentrant=reentrant), a=nn.Linear(2, 2))
    x = torch.randn(1, 2, requires_grad=True)
    recording = record(model, lambda: model(x))
    assert names(recording.functional_calls) == ["add_0"]
    assert names(recording.module_calls) == ["a"]


def test_what_users_hooks_compute_is_attributed_to_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with model[0].register_forward_hook(lambda m, args, out: out.tanh()):
        assert run(model, torch.randn(1, 3, 5, 5)).producer_of("1").op == "tanh"
    with model[1].register_forward_pre_hook(lambda m, args: args[0].exp()):
        assert run(model, torch.randn(1, 3, 5, 5)).producer_of("1").op == "exp"
    assert run(model, torch.randn(1, 3, 5, 5)).producer_of("1").name == "0"


def test_unknown_names_and_inputs_are_errors():
    recording = run(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2))
    with pytest.raises(QuantizationError, match="'00' was not called in the recorded pass"):
        recording.producer_of("00")
    with pytest.raises(QuantizationError, match="has 1 tensor inputs, asked for number 1"):
        recording.producer_of("0", 1)
    with pytest.raises(QuantizationError, match="was not called"):
        recording.following_activation("nothing")
