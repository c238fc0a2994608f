"""The recorder against graphs known from the code of the models."""

from __future__ import annotations

import gc
import pickle
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lq_plugin.errors import QuantizationError
from lq_plugin.model.record import Recording, record
from tests.models import Attention, BasicBlock, Function, MobileNet, PreActivation, SharedConv, TwoConsumers, resnet20


def run(model: nn.Module, *inputs, **kwargs) -> Recording:
    with torch.no_grad():
        return record(model.eval(), lambda: model(*inputs, **kwargs))


def names(calls) -> list[str]:
    return [call.name for call in calls]


def state_of(model: nn.Module) -> list:
    """Everything about hooks and flags that recording could leave behind."""
    return [
        (list(m._forward_hooks), list(m._forward_pre_hooks), dict(m._forward_hooks_with_kwargs), dict(m._forward_hooks_always_called),
         dict(m._forward_pre_hooks_with_kwargs), m.training, sorted(m.__dict__))
        for m in model.modules()
    ]  # fmt: skip


# --- names, order, kinds --------------------------------------------------------------------------


def test_residual_adds_are_named_after_their_block():
    recording = run(resnet20(4), torch.randn(2, 3, 32, 32))
    assert names(recording.functional_calls) == [f"layer{s}.{b}.add_0" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert [call.name for call in recording.module_calls if call.op == "Conv2d"][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    add = recording.functional_calls[0]
    assert (add.op, add.kind, add.macs) == ("add", "functional", 0)
    assert add.input_shapes == ((2, 4, 32, 32), (2, 4, 32, 32))


def test_written_out_attention():
    recording = run(nn.Sequential(Attention()), torch.randn(2, 5, 16))
    assert names(recording.functional_calls) == ["0.matmul_0", "0.matmul_1"]
    first, second = recording.functional_calls
    # q, k and v are views of one output.
    assert [recording.producer_of(first, i).name for i in (0, 1)] == ["0.qkv", "0.qkv"]
    assert recording.producer_of(second, 1).name == "0.qkv"
    assert names(recording.consumers_of("0.qkv")) == ["0.matmul_0", "0.matmul_1"]
    assert recording.producer_of("0.proj").name == "0.matmul_1"
    assert recording.producer_of(second, 0).op == "softmax"


def test_root_module_has_no_prefix_and_constants_do_not_count():
    def forward(m, x):
        y = x + 1
        y = y + torch.arange(4.0)
        y = m.bias + y
        y = x.long() + x.long()  # integers: positions, not activations
        z = x.relu()
        return (z - x) * x, torch.cat([x, z], dim=0), torch.cat([m.bias.expand(1, 4), x]), y, x.sum() + z.sum()

    model = Function(forward)
    model.bias = nn.Parameter(torch.zeros(4))
    recording = run(model, torch.randn(2, 4))
    assert names(recording.functional_calls) == ["sub_0", "mul_0", "cat_0"]
    assert "other_add_0" in names(recording.calls)


def test_parameters_read_by_functional_calls_are_named():
    model = Function(lambda m, x: F.linear(x, m.lin.weight.clone()) + m.lin(x) * m.lin.bias, lin=nn.Linear(4, 4))
    recording = run(model, torch.randn(2, 4))
    read = {name for call in recording.calls for source in call.inputs for name in source.parameters}
    assert read == {"lin.weight", "lin.bias"}
    assert all(source.parameters == () for call in recording.module_calls for source in call.inputs)


def test_childless_modules_of_others_are_looked_into_and_is_leaf_can_close_them():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight)

    model, x = nn.Sequential(Mine()), torch.randn(1, 4, 5, 5)
    recording = run(model, x)
    assert recording.macs == {"0.conv2d_0": 6 * 9 * 4 * 9}
    with torch.no_grad():
        closed = record(model, lambda: model(x), is_leaf=lambda m: isinstance(m, Mine))
    assert names(closed.module_calls) == ["0"]
    assert closed.functional_calls == ()


def test_a_leaf_subclass_with_submodules_is_opaque():
    class QuantizedLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.input_quantizer = nn.Identity()

        def forward(self, x):
            return F.linear(self.input_quantizer(x) * x, self.weight)

    recording = run(nn.Sequential(QuantizedLinear(), nn.ReLU()), torch.randn(2, 4))
    assert names(recording.module_calls) == ["0", "1"]
    assert recording.functional_calls == ()
    assert recording.producer_of("1").name == "0"


def test_uncalled_layers_are_listed():
    model = Function(lambda m, x: m.used(x), used=nn.Linear(2, 2), unused=nn.Linear(2, 2), idle=nn.ReLU())
    assert run(model, torch.randn(1, 2)).uncalled == ("unused",)


# --- the graph ------------------------------------------------------------------------------------


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


def test_in_place_modules_make_new_values():
    recording = run(MobileNet(), torch.randn(2, 3, 16, 16))
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
    recording = run(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2)), torch.randn(2, 3, 5, 5))
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

    recording = run(Function(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4))
    assert {recording.producer_of(call).op for call in recording.calls_of("b")} == {"relu"}
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
    model = Function(lambda m, x: m.b(y) + Double.apply(y) if (y := m.a(x)) is not None else None, a=nn.Linear(2, 2), b=nn.Linear(2, 2))
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


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_same_graph_in_every_mode(training: bool, context):
    model, x = nn.Sequential(resnet20(4), nn.Flatten()), torch.randn(2, 3, 32, 32)
    reference = run(model, x)
    model.train(training)
    with context():
        recording = record(model, lambda: model(x))
    assert names(recording.functional_calls) == names(reference.functional_calls)
    assert recording.total_macs == reference.total_macs
    for name in ("0.bn1", "0.layer3.2.bn2", "0.linear"):
        assert recording.producer_of(name).name == reference.producer_of(name).name
    assert recording.following_activation("0.layer2.1.bn1").op == "relu"


def encoder(layers: int = 2, nested: bool = True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_transformer_encoder_fast_path_is_off_while_recording(context, padded: bool):
    model, x = encoder().eval(), torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with context():
        before = model(x, src_key_padding_mask=mask)
        recording = record(model, lambda: model(x, src_key_padding_mask=mask))
        after = model(x, src_key_padding_mask=mask)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    layer = ["self_attn", "dropout1", "norm1", "linear1", "dropout", "linear2", "dropout2", "norm2"]
    assert names(recording.module_calls) == [f"layers.{i}.{name}" for i in range(2) for name in layer]
    assert names(recording.functional_calls) == [f"layers.{i}.add_{j}" for i in range(2) for j in range(2)]
    attention = 2 * (4 * 5 * 16 * 16 + 2 * 5 * 5 * 16)
    assert recording.total_macs == 2 * (attention + 2 * 5 * 2 * 16 * 32)
    assert recording.following_activation("layers.0.linear1").op == "relu"


def test_compiled_models_run_eagerly_while_recording():
    def never(graph, inputs):
        raise AssertionError("compiled while recording")

    model = nn.Sequential(BasicBlock(4, 4, 1))
    model.compile(backend=never)
    recording = run(model, torch.randn(1, 4, 4, 4))
    assert names(recording.functional_calls) == ["0.add_0"]
    wrapped = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend=never)
    assert names(run(wrapped, torch.randn(1, 2)).module_calls) == ["_orig_mod.0"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_modules_are_opaque_consumers():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = Function(lambda m, x: m.s(y := m.a(x)) + m.b(y), a=nn.Linear(4, 4), s=scripted, b=nn.Linear(4, 4))
    recording = run(model, torch.randn(2, 4))
    assert names(recording.consumers_of("a")) == ["s", "b"]
    assert recording.producer_of("add_0").name == "s"


def test_lazy_modules_are_refused():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(3, 3))
    with pytest.raises(QuantizationError, match=r"2 faults(.|\n)*'0' \(LazyLinear\)(.|\n)*'1' \(LazyConv2d\)"):
        record(model, lambda: None)


# --- nothing is left behind -----------------------------------------------------------------------


def test_model_is_as_before_also_after_an_exception():
    def forward(m, x):
        y = m.block(x)
        if m.fail:
            raise KeyError("in the middle")
        return m.block(y)

    model = Function(forward, block=BasicBlock(4, 4, 1))
    model.fail = True
    model.block.conv1.register_forward_hook(lambda m, args, out: None)
    before, weights = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError, match="in the middle"):
        run(model, torch.randn(1, 4, 4, 4))
    model.train()
    assert state_of(model) == before
    model.fail = False
    run(model, torch.randn(1, 4, 4, 4))
    model.train()
    assert state_of(model) == before
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_exception_the_model_catches_does_not_confuse_the_names():
    def broken(m, x):
        m.inner(x)
        raise ValueError("caught by the model")

    def forward(m, x):
        try:
            x = m.bad(x)
        except ValueError:
            x = x + x
        return m.good(x) + x

    bad = Function(broken, inner=nn.Linear(2, 2))
    recording = run(Function(forward, bad=bad, good=nn.Linear(2, 2)), torch.randn(1, 2))
    assert names(recording.functional_calls) == ["add_0", "add_1"]
    assert names(recording.module_calls) == ["bad.inner", "good"]


def test_results_are_the_same_while_recording():
    torch.manual_seed(0)
    for model, shape in ((resnet20(4), (2, 3, 32, 32)), (PreActivation(), (2, 8, 6, 6)), (Attention(), (2, 5, 16))):
        x = torch.randn(shape)
        model.eval()
        seen = []
        with torch.no_grad():
            expected = model(x)
            record(model, lambda: seen.append(model(x)))  # noqa: B023
        assert torch.equal(seen[0], expected)


def test_recording_is_plain_and_holds_no_tensor():
    refs = []

    def forward(m, x):
        y = m.a(x)
        refs.append(weakref.ref(y))
        return y.sum()

    model = Function(forward, a=nn.Linear(64, 64))
    recording = run(model, torch.randn(2, 64))
    gc.collect()
    assert refs[0]() is None
    assert pickle.loads(pickle.dumps(recording)) == recording
    assert pickle.loads(pickle.dumps(recording)).producer_of("sum_0").name == "a"


def test_unknown_names_and_inputs_are_errors():
    recording = run(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2))
    with pytest.raises(QuantizationError, match="'00' was not called in the recorded pass"):
        recording.producer_of("00")
    with pytest.raises(QuantizationError, match="has 1 tensor inputs, asked for number 1"):
        recording.producer_of("0", 1)
    with pytest.raises(QuantizationError, match="was not called"):
        recording.following_activation("nothing")
