"""Recordings hold every call under its name, in all modes, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lq_plugin.errors import QuantizationError
from lq_plugin.model.graph.record import Recording, record
from tests.models import Attention, BasicBlock, Function, PreActivation, resnet20


def run(model: nn.Module, *inputs, **kwargs) -> Recording:
    with torch.no_grad():
        return record(model.eval(), lambda: model(*inputs, **kwargs))


def names(calls) -> list[str]:
    return [call.name for call in calls]


def state_of(model: nn.Module) -> list:
    """Everything about hooks and flags that recording could leave behind."""
    return [
        (list(m._forward_hooks), list(m._forward_pre_hooks), dict(m._forward_hooks_with_kwargs),
        dict(m._forward_hooks_always_called),
         dict(m._forward_pre_hooks_with_kwargs), m.training, sorted(m.__dict__))
        for m in model.modules()
    ]  # fmt: skip


# --- names, order, kinds --------------------------------------------------------------------------


def test_residual_adds_are_named_after_their_block():
    recording = run(resnet20(4), torch.randn(2, 3, 32, 32))
    assert names(recording.functional_calls) == [f"layer{s}.{b}.add_0" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert [call.name for call in recording.module_calls if call.op == "Conv2d"][:3] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
    ]
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


@pytest.mark.parametrize("fails", [False, True])
def test_no_activation_outlives_the_recording(fails: bool):
    storages = []

    def forward(m, x):
        y = m.a(x)
        storages.append(StorageWeakRef(y.untyped_storage()))
        z = y.sum()
        del y
        if m.fails:
            raise KeyError("in the middle")
        return z

    model = Function(forward, a=nn.Linear(64, 64))
    model.fails = fails
    if fails:
        # The error, kept for its traceback, keeps the frames of the recorder alive.
        with pytest.raises(KeyError) as kept:
            run(model, torch.randn(2, 64))
        assert kept.value.__traceback__ is not None
    else:
        recording = run(model, torch.randn(2, 64))
        again = pickle.loads(pickle.dumps(recording))
        assert again == recording
        assert again.producer_of("sum_0").name == "a"
    gc.collect()
    assert storages[0].expired()


class KeepsACopy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        object.__setattr__(self, "kept", copy.deepcopy(self.layer))
        return self.layer(x) + self.kept(x)


def test_a_module_that_is_copied_while_it_is_recorded():
    model, x = KeepsACopy(), torch.randn(2, 4)
    recordings = [run(model, x) for _ in range(3)]
    assert recordings[0].macs == {"layer": 32, "linear_0": 32, "add_0": 0}
    assert recordings[0] == recordings[2]
    assert torch.equal(model.kept(x), model.layer(x))
    assert torch.equal(copy.deepcopy(model.kept)(x), model.layer(x))
