"""Weights that are computed, by torch's parametrize or by a hook: the computed weight is what is quantized."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lq_plugin import PlanError, QuantizationError, Rule, calibrate, prepare, remove
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.layers import weight_is_computed, weight_of
from lq_plugin.model import quantizers
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.ptq.batch_norm.fold import Pair, find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.equalization.equalize import equalize
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.ptq.smooth_quant.smooth import smooth_quant

PLAN = "w4 mse a8 minmax"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
]


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 2 * weight


class LowRank(nn.Module):
    """Parametrization like LoRA's: the weight stays as it is, two small matrices are added."""

    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 1)), nn.Parameter(torch.randn(1, columns))

    def forward(self, weight):
        return weight + self.a @ self.b


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 3


def parametrized(layer, *parametrizations, name="weight"):
    for parametrization in parametrizations:
        parametrize.register_parametrization(layer, name, parametrization)
    return layer


def scaled(x, weight, bias):
    return F.linear(x, weight, bias) * 3


def conv2d(x, weight, bias):
    return F.conv2d(x, weight, bias, stride=2)


#: How it is made, its operation, and the shape of its input.
PARAMETRIZED = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 6)), F.linear, (3, 4)),
    "weight_norm of all": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, 2), dim=None), conv2d, (2, 4, 8, 8)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv1d(4, 6, 3)), F.conv1d, (2, 4, 8)),
    "spectral_norm, 3d": (lambda: parametrizations.spectral_norm(nn.Conv3d(2, 4, 3)), F.conv3d, (2, 2, 4, 4, 4)),
    "spectral_norm, transposed": (
        lambda: parametrizations.spectral_norm(nn.ConvTranspose1d(4, 6, 3)), F.conv_transpose1d, (2, 4, 8),
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), F.linear, (3, 4)),
    "two of them": (lambda: parametrized(parametrizations.weight_norm(nn.Linear(4, 4)), Doubled()), F.linear, (3, 4)),
    "bias, too": (lambda: parametrized(parametrizations.weight_norm(nn.Linear(4, 6)), Doubled(), name="bias"), F.linear,
    (3, 4)),
    "low rank": (lambda: parametrized(nn.Linear(4, 6), LowRank(6, 4)), F.linear, (3, 4)),
    "own, transposed": (lambda: parametrized(nn.ConvTranspose2d(4, 6, 3), Doubled()), F.conv_transpose2d, (2, 4, 5, 5)),
    "own forward": (lambda: parametrizations.weight_norm(Scaled(4, 6)), scaled, (3, 4)),
}  # fmt: skip
every_layer = pytest.mark.parametrize("name", PARAMETRIZED)


def made(name):
    torch.manual_seed(0)
    make, function, shape = PARAMETRIZED[name]
    return nn.Sequential(make()), function, torch.randn(shape)


def states_equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@every_layer
@pytest.mark.parametrize("plan", ["w4 minmax a8 minmax", "w4 lsq a4 lsq"])
def test_the_computed_weight_is_quantized_once_in_each_forward_pass(name, plan):
    """In training and evaluation, after the same computation as the float layer's; gradients reach all that it is made
    of."""
    net, function, x = made(name)
    ledger = prepare(net, plan)
    calibrate(net, [x])
    layer = net[0]
    for training in (True, False):
        net.train(training)
        calls = []
        hooks = [
            q.register_forward_hook(lambda q, _args, _y, calls=calls: calls.append(q.name)) for q in quantizers(net)
        ]
        twin = copy.deepcopy(layer)
        y = net(x)
        assert sorted(calls) == ["0.input", "0.weight"]
        for hook in hooks:
            hook.remove()
        weight = twin.from_canonical(twin.weight_quantizer(twin.canonical(twin.weight)))
        assert len(twin.canonical(weight).detach()[0].unique()) <= 16
        assert torch.equal(y, function(twin.input_quantizer(x), weight, twin.bias))
        # The state of a parametrization (spectral_norm's vectors) has moved once.
        assert states_equal(layer.state_dict(), twin.state_dict())
    y.square().sum().backward()
    sources = list(layer.parametrizations.weight.parameters())
    assert sources
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sources)
    assert [entry.name for entry in ledger.quantized] == ["0"]
    assert (
        ledger["0"].parameters
        == layer.weight.numel() + ("parametrizations.bias" not in str(list(layer.state_dict()))) * layer.bias.numel()
    )


@every_layer
def test_preparing_calibrating_and_looking_leave_no_trace(name):
    """Not even in training mode, where spectral_norm moves its vectors at each look."""
    net, _, x = made(name)
    kinds, names = [type(m) for m in net.modules()], [key for key, _ in net.named_parameters()]
    state = copy.deepcopy(net.state_dict())
    prepare(net, PLAN)
    calibrate(net, [x])
    cost(net)
    weight_of(net[0])
    now = net.state_dict()
    assert all(torch.equal(now[key], value) for key, value in state.items())
    assert {key.partition("_quantizer.")[0] for key in now.keys() - state.keys()} == {"0.weight", "0.input"}
    assert all(module.training for module in net.modules())
    remove(net)
    assert [type(m) for m in net.modules()] == kinds
    assert [key for key, _ in net.named_parameters()] == names
    assert states_equal(net.state_dict(), state)


@every_layer
def test_switched_off_it_trains_as_the_float_layer_does(name):
    net, _, x = made(name)
    states = []
    for quantized in (False, True):
        module = copy.deepcopy(net)
        if quantized:
            prepare(module, PLAN)
            calibrate(module, [x])
        optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
        with float_forward(module):
            for _ in range(3):
                optimizer.zero_grad()
                module(x).square().mean().backward()
                optimizer.step()
        remove(module)
        states.append((module.state_dict(), module.eval()(x)))
    assert states_equal(states[0][0], states[1][0])
    assert not states_equal(states[0][0], net.state_dict())
    assert torch.equal(states[0][1], states[1][1])


@every_layer
def test_parametrizations_come_off_before_within_and_after(name):
    """`remove_parametrizations` leaves the computed weight behind, as a plain parameter, float or quantized."""
    answers = []
    for when in ("before", "within", "after"):
        net, _, x = made(name)
        net.eval()
        with torch.no_grad():
            want = net(x)
        for moment in ("before", "within", "after"):
            if moment == "within":
                prepare(net, PLAN)
                calibrate(net, [x])
                with torch.no_grad():
                    answers.append(net(x))
            elif moment == "after":
                remove(net)
            if moment == when:
                for tensor in list(net[0].parametrizations):
                    parametrize.remove_parametrizations(net[0], tensor)
            if moment == when == "within":
                assert not weight_is_computed(net[0])
                assert isinstance(net[0].weight, nn.Parameter)
                with torch.no_grad():
                    assert torch.equal(net(x), answers[-1])
        assert type(net[0]) is type(PARAMETRIZED[name][0]()).__bases__[0]
        with torch.no_grad():
            assert torch.equal(net(x), want)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[1], answers[2])


def test_one_of_two_parametrizations_comes_off_while_quantized():
    for removed, kept in (("weight", "bias"), ("bias", "weight")):
        net, _, x = made("bias, too")
        want = net(x)
        prepare(net, PLAN)
        parametrize.remove_parametrizations(net[0], removed)
        remove(net)
        assert not parametrize.is_parametrized(net[0], removed)
        assert parametrize.is_parametrized(net[0], kept)
        assert torch.equal(net(x), want)
        parametrize.remove_parametrizations(net[0], kept)
        assert type(net[0]) is nn.Linear
        assert torch.equal(net(x), want)


def test_parametrized_after_its_quantizers_came_in():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    parametrize.register_parametrization(net[0], "weight", Doubled())
    layer = net[0]
    assert torch.equal(
        net(x),
        F.linear(
            layer.input_quantizer(x), layer.weight_quantizer(2 * layer.parametrizations.weight.original), layer.bias
        ),
    )
    remove(net)
    assert type(layer).__bases__ == (nn.Linear,)
    assert torch.equal(net(x), F.linear(x, 2 * layer.parametrizations.weight.original, layer.bias))
    net, x = nn.Sequential(nn.ConvTranspose1d(4, 4, 3)), torch.randn(2, 4, 8)
    prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    parametrize.register_parametrization(net[0], "weight", Doubled())
    with pytest.raises(
        QuantizationError, match="a ConvTranspose1d was parametrized after its quantizers came in: prepare it later"
    ):
        net(x)


@every_layer
def test_copies_are_on_their_own_and_pickle_says_what_torch_says(name):
    net, _, x = made(name)
    float_error = pytest.raises(
        RuntimeError, match="Serialization of parametrized modules is only supported through state_dict"
    )
    with float_error:
        pickle.dumps(net)
    prepare(net, PLAN)
    calibrate(net, [x])
    net.eval()
    with pytest.raises(
        RuntimeError, match="Serialization of parametrized modules is only supported through state_dict"
    ):
        pickle.dumps(net)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        want = net(x)
        for p in net.parameters():
            p.mul_(1.5)
        assert torch.equal(copied(x), want)
        assert not torch.equal(net(x), want)
    remove(copied)
    assert len(quantizers(net)) == 2
    # A state dict goes from one to the other.
    other, _, _ = made(name)
    prepare(other, PLAN)
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), net(x))


def test_cached_weights_are_computed_once():
    """Inside torch's `parametrize.cached()`; and a look of ours never puts anything there."""
    net, _, x = made("own, transposed")
    prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    doubled = net[0].parametrizations.weight[0]
    want = net(x)
    with parametrize.cached():
        weight_of(net[0])
        before = doubled.calls
        assert torch.equal(net(x), want)
        assert torch.equal(net(x), want)
        assert doubled.calls == before + 1
    doubled.calls = 0
    net(x)
    assert doubled.calls == 1


def test_embeddings():
    """Rows of the quantized computed table; with `max_norm`, the float layer where switched off."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 8, (3, 5))
    for options in ({}, {"max_norm": 0.7}):
        net = nn.Sequential(parametrized(nn.Embedding(8, 4, **options), Doubled()))
        want = net(tokens)
        prepare(net, "w4 minmax")
        with float_forward(net):
            assert torch.equal(net(tokens), want)
        if not options:
            layer = net[0]
            assert torch.equal(net(tokens), layer.weight_quantizer(2 * layer.parametrizations.weight.original)[tokens])
            net(tokens).sum().backward()
            assert layer.parametrizations.weight.original.grad.abs().sum() > 0
        remove(net)
        assert torch.equal(net(tokens), want)


def test_xnor_reads_the_weight_once():
    torch.manual_seed(0)
    net = nn.Sequential(parametrized(nn.Conv2d(4, 4, 3), Doubled()), nn.Flatten(), nn.Linear(16, 2))
    prepare(net, QuantPlan([Rule("0", weight="int4 per_channel", input="xnor")]))
    x = torch.randn(2, 4, 4, 4)
    calibrate(net, [x])
    doubled = net[0].parametrizations.weight[0]
    doubled.calls = 0
    layer = net[0]
    y = layer(x)
    assert doubled.calls == 1
    k = F.conv2d(x.abs().mean(1, keepdim=True), torch.full((1, 1, 3, 3), 1 / 9))
    torch.testing.assert_close(
        y, F.conv2d(layer.input_quantizer(x), layer.quantized_weight()) * k + layer.bias.view(-1, 1, 1)
    )


def test_scales_of_frozen_weights_are_frozen():
    """A weight is frozen when nothing that it is computed from is trained."""
    for frozen, trained in ((["original"], True), (["original", "a", "b"], False)):
        net = made("low rank")[0]
        for key, p in net[0].parametrizations.weight.named_parameters():
            p.requires_grad_(key.rpartition(".")[2] not in frozen)
        prepare(net, "w4 lsq a4 lsq")
        assert {p.requires_grad for q in quantizers(net) for p in q.parameters()} == {trained}
    with torch.no_grad():  # where what is computed asks for no gradient
        net = made("weight_norm")[0]
        prepare(net, "w4 lsq")
        assert net[0].weight_quantizer.scale.requires_grad


def test_storage_counts_the_weight_and_not_what_it_is_computed_from():
    sizes = []
    for name in ("weight_norm", None):
        net = made(name)[0] if name else nn.Sequential(nn.Linear(4, 6))
        prepare(net, "w4 a8")
        priced = cost(net)
        sizes.append((priced["0"].elements, priced["0"].storage_bits, priced.bytes, priced.effective_bits))
    assert sizes[0] == sizes[1]
    # Two layers of their own are not taken for tied ones.
    net = nn.Sequential(*(parametrized(nn.Linear(4, 4), Doubled()) for _ in range(3)))
    assert [row.tied_to for row in cost(net).rows] == [None] * 3


def test_no_operations_are_recorded_inside_the_computation():
    net, _, x = made("orthogonal")
    recording = record(net, lambda: net(x))
    ledger = prepare(net, PLAN)
    ledger.add_recording(recording)
    assert [entry.name for entry in ledger] == ["0"]
    assert (ledger.weight_coverage, ledger.compute_coverage) == (1.0, 1.0)


WRITES = {
    "gptq": lambda net, x: gptq(net, [x]).skipped,
    "reconstruct": lambda net, x: reconstruct(net, [x], by="layer", iterations=20).skipped,
}


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.3)]
)
@pytest.mark.parametrize("write", WRITES)
def test_learned_roundings_are_not_written_into_computed_weights(write, make):
    """The layer keeps nearest rounding, with the reason; its neighbour is rounded anew."""
    torch.manual_seed(0)
    net, x = nn.Sequential(make(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 8)
    prepare(net.eval(), "w3 mse a8 minmax")
    calibrate(net, [x])
    before, want = copy.deepcopy(net[0].state_dict()), net[0].quantized_weight()
    skipped = WRITES[write](net, x)
    assert list(skipped) == ["0"]
    assert skipped["0"].startswith("its weight is computed (weight_norm, pruning, ...) and cannot be written")
    assert torch.equal(net[0].quantized_weight(), want)
    # Biases are learned, too.
    assert all(torch.equal(value, before[key]) for key, value in net[0].state_dict().items() if "bias" not in key)


def test_passes_that_scale_weights_leave_computed_ones_alone():
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(2, 4, 3, bias=False)), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 2, 6, 6)
    state = copy.deepcopy(net.state_dict())
    pairs, refused = find_batch_norm_pairs(net, record(net, lambda: net(x)))
    assert not pairs
    assert "the weight of '0' (ParametrizedConv2d) is computed" in str(refused[0])
    with pytest.raises(QuantizationError, match="'0': its weight is computed"):
        fold_batch_norm(net, [Pair("0", "1")])
    assert states_equal(net.state_dict(), state)
    net, x = (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4)).eval(),
        torch.randn(2, 4),
    )
    refused = equalize(net, record(net, lambda: net(x))).refused
    assert str(refused[0]) == "'0': its weight is computed, not a plain parameter"
    net, x = nn.Sequential(nn.LayerNorm(4), parametrizations.weight_norm(nn.Linear(4, 4))).eval(), torch.randn(2, 4)
    refused = smooth_quant(net, [x], record(net, lambda: net(x))).refused
    assert "its weight is computed, not a plain parameter" in str(refused[0])


def test_formats_that_clip_their_weight_are_refused():
    """BinaryConnect and BWN write into the weight after each step."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=r"cannot be kept in an interval(?s:.*)0: 'bwn.*' clips its weight"):
        prepare(net, QuantPlan([Rule("*", weight="bwn")]))
    assert not quantizers(net)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm, transposed", "own forward", "orthogonal"])
def test_compiled_it_is_one_graph_with_the_same_numbers(name):
    net, _, x = made(name)
    prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    net.eval()
    torch.compiler.reset()
    try:
        with torch.no_grad():
            assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
    finally:
        torch.compiler.reset()


REFUSED = {
    "LSTM": lambda: parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"),
    "attention": lambda: parametrize.register_parametrization(nn.MultiheadAttention(4, 2), "in_proj_weight", Doubled()),
    "output of attention": lambda: with_parametrized_output(nn.MultiheadAttention(4, 2)),
}


def with_parametrized_output(attention):
    parametrized(attention.out_proj, Doubled())
    return attention


@pytest.mark.parametrize("name", REFUSED)
def test_modules_with_several_weights_are_refused_with_the_reason(name):
    """Their kernels take the parameters themselves. A plan for all layers says in the ledger that they stay float;
    nothing changes."""
    torch.manual_seed(0)
    net = nn.Sequential(REFUSED[name](), nn.Linear(4, 2))
    state, kinds = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    ledger = prepare(net, PLAN)
    assert [layer for layer, _ in quantized_layers(net)] == ["1"]
    assert not ledger["0"].quantized
    assert "no plain parameter" in ledger["0"].reason
    remove(net)
    assert [type(m) for m in net.modules()] == kinds
    assert states_equal(net.state_dict(), state)
    with pytest.raises(
        PlanError, match=r"'0' matches no layer that can be quantized(?s:.*)\n  0: its .*no plain parameter"
    ):
        prepare(net, QuantPlan([Rule("*", weight="int8"), Rule("0", weight="int4")]))
    assert not quantized_layers(net)


HOOKED = {
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), F.linear, (3, 4)),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Conv1d(4, 4, 3)), F.conv1d, (2, 4, 8)),
    "spectral_norm, transposed": (
        lambda: nn.utils.spectral_norm(nn.ConvTranspose1d(4, 4, 3)),
        F.conv_transpose1d,
        (2, 4, 8),
    ),
}


@pytest.mark.parametrize("name", HOOKED)
def test_weights_that_a_hook_computes_are_quantized_as_computed(name):
    """The older weight_norm and spectral_norm: what they compute is fake-quantized, and gradients reach what they
    compute it from."""
    torch.manual_seed(0)
    make, function, shape = HOOKED[name]
    layer, x = make(), torch.randn(shape)
    net = nn.Sequential(layer)
    keys = set(net.state_dict())
    ledger = prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    assert ledger["0"].quantized
    for training in (True, False):
        net.train(training)
        y = net(x)
        weight = layer.from_canonical(layer.weight_quantizer(layer.canonical(layer.weight)))
        assert len(layer.canonical(weight).detach()[0].unique()) <= 16
        assert torch.equal(y, function(layer.input_quantizer(x), weight, layer.bias))
    y.square().sum().backward()
    sources = [p for key, p in layer.named_parameters() if key.startswith("weight_") and "quantizer" not in key]
    assert sources
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sources)
    remove(net)
    assert set(net.state_dict()) == keys


class Cropped(nn.ConvTranspose1d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x)[..., 1:-1]


def test_subclasses_of_transposed_convolutions_run_their_own_forward():
    torch.manual_seed(0)
    layer, x = Cropped(4, 4, 3), torch.randn(2, 4, 8)
    net = nn.Sequential(layer)
    prepare(net, "w4 minmax a8 minmax")
    calibrate(net, [x])
    net = copy.deepcopy(net)
    want = F.conv_transpose1d(net[0].input_quantizer(x), net[0].quantized_weight(), layer.bias)[..., 1:-1]
    assert torch.equal(net(x), want)
    remove(net)
    assert type(net[0]) is Cropped
