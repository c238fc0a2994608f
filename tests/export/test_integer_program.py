"""Integer programs of ExecuTorch and LiteRT, as torch runs them: grids, folded batch norms, biases, and refusals."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.errors import ExportError
from lq_plugin.export.executorch_file import XNNPACK
from lq_plugin.export.integer_program.build import integer_program
from lq_plugin.export.integer_program.pieces import example, in_pieces
from lq_plugin.export.litert_file import TFLITE
from lq_plugin.export.planned import plan_for
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS
from lq_plugin.model import record
from lq_plugin.ptq import run_phases
from tests.models import randomize

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")
X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A batch norm with factors of both signs, depthwise channels, a residual sum, and a head behind slices."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act, self.head = nn.Hardswish(), nn.Linear(32, 6)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.act(self.depthwise(x))
        return self.head(x[:, :, ::4, ::4].flatten(1))


def network(*rules, weight="int8 per_channel narrow", activation="uint8 affine", model=None):
    torch.manual_seed(0)
    net = randomize(Net() if model is None else model).eval()
    plan = QuantPlan([Rule("*", weight=weight, input=activation), *rules])
    prepare(net, plan, record(net, lambda: net(X)))
    calibrate(net, [X])
    return net


#: What runtimes round besides the inputs of layers.
EVERYTHING = (Rule("add_0", input="uint8 affine"), *(Rule(n, output="uint8 affine") for n in ("depthwise", "head")))


def nodes(program, kind):
    return [n for n in program.graph.nodes if n.op == "call_function" and kind in str(n.target)]


def outputs(program, x=X):
    run = program.module(check_guards=False)
    with torch.no_grad():
        return torch.cat([run(x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("form", [XNNPACK, TFLITE], ids=["XNNPACK", "LiteRT"])
@pytest.mark.parametrize("weight", ["int8 per_channel narrow", "int4 per_channel", "uint4 affine", "twn"])
def test_a_program_computes_what_was_trained(form, weight):
    net = network(*EVERYTHING, weight=weight)
    program = integer_program(net, (X[:1],), [X], form)
    step = float(net.head.output_quantizer.scale)
    with torch.no_grad():
        wanted = net(X)
    assert ((outputs(program) - wanted).abs() <= 1.01 * step).float().mean() > 0.99
    for product in nodes(program, "aten.conv2d") + nodes(program, "aten.linear"):
        assert "dequantize_per_tensor" in str(product.args[0].target)
        assert "dequantize_per_channel" in str(product.args[1].target)
        assert ["quantize_per_tensor" in str(user.target) for user in product.users] == [True]
    assert not nodes(program, "batch_norm")
    assert not nodes(program, "relu")  # rounding clips at 0
    assert all(len(node.users) == 1 for node in nodes(program, "dequantize_per_tensor"))


def test_numbers_by_hand():
    """A convolution of one pixel with its batch norm, in numpy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    randomize(net).eval()
    with torch.no_grad():
        net[1].weight[:3] = torch.tensor([1.5, -0.5, 0.0])
    prepare(net, QuantPlan([Rule("0", weight="int8 per_channel narrow", input="int8")]))
    calibrate(net, [X])
    program = integer_program(net, (X[:1],), [X], XNNPACK)
    conv, norm = net[0], net[1]
    w = conv.weight.detach().double().numpy()[:, :, 0, 0]
    scale = np.abs(w).max(1) / 127
    factor = norm.weight.detach().double().numpy() / np.sqrt(norm.running_var.double().numpy() + norm.eps)
    codes = np.rint(w / scale[:, None]) * np.sign(factor)[:, None]
    bias = (conv.bias.detach().double().numpy() - norm.running_mean.double().numpy()) * factor
    bias += norm.bias.detach().double().numpy()

    (stored,), (call,) = nodes(program, "dequantize_per_channel"), nodes(program, "aten.conv2d")
    held = dict(zip([n.name for n in program.graph.nodes], program.graph.nodes, strict=True))
    names = program.graph_signature.inputs_to_buffers
    values = {n: program.state_dict[names[n.name]].double().numpy() for n in held.values() if n.name in names}
    np.testing.assert_array_equal(values[stored.args[0]][:, :, 0, 0], codes)
    np.testing.assert_allclose(values[stored.args[1]][[0, 1, 3]], (scale * np.abs(factor))[[0, 1, 3]], rtol=1e-6)
    np.testing.assert_allclose(values[call.args[2]], bias, rtol=1e-5, atol=1e-7)

    x = X.double().numpy()
    step = max(x.max() / 127, -x.min() / 128)
    q = np.clip(np.rint(x / step), -128, 127)
    y = np.einsum("oc,nchw->nohw", codes * (scale * np.abs(factor))[:, None], q * step) + bias[:, None, None]
    last = nodes(program, "quantize_per_tensor")[-1]
    low, high = min(y.min(), 0), max(y.max(), 0)
    np.testing.assert_allclose(last.args[1], (high - low) / 255, rtol=1e-3)
    assert np.abs(outputs(program).numpy() - y).max() <= 0.51 * last.args[1]


def test_a_shortcut_reads_the_grid_of_the_next_layer():
    """One tensor, rounded for a layer and read float by a sum, has one quantize node."""
    program = integer_program(network(), (X[:1],), [X], XNNPACK)
    (add,) = nodes(program, "aten.add")
    conv = nodes(program, "aten.conv2d")[1]
    assert add.args[0].args[0] is conv.args[0].args[0]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        return torch.cat([self.b(x), self.c(x)], 1)


@pytest.mark.parametrize("form", [XNNPACK, TFLITE], ids=["XNNPACK", "LiteRT"])
def test_two_scales_of_one_tensor_and_a_concatenation(form, caplog):
    """The finest is that of the tensor, the other reader rounds again; what is joined has the grid of the whole.

    For LiteRT, whose converter takes one of two roundings in a row away, a product with 1 stands between.
    """
    net = network(model=Two())
    net.c.input_quantizer.scale.mul_(2)
    with caplog.at_level(logging.WARNING):
        program = integer_program(net, (X[:1],), [X], form)
    assert "its readers have 2 scales" in caplog.text
    a, b, c = nodes(program, "aten.conv2d")
    (q,) = a.users
    assert q.args[1] == float(net.b.input_quantizer.scale)
    assert b.args[0].args[0] is q
    before = c.args[0].args[0].args[0]
    if form is TFLITE:
        real, one = before.args
        assert [node.args[1:3] for node in (one, one.args[0])] == [(2.0**-6, 0)] * 2
        assert len(nodes(program, "aten.mul")) == 3  # here, and what is joined
        plain = integer_program(net, (X[:1],), [X], replace(TFLITE, loses_roundings=False))
        assert not nodes(plain, "aten.mul")
        assert torch.equal(outputs(program), outputs(plain))
        before = real
    assert before.args[0] is q
    (cat,) = nodes(program, "aten.cat")
    assert len({node.args[1:3] for node in [*cat.args[0], next(iter(cat.users))]}) == 1


def test_a_padded_shortcut_is_the_model_s_where_its_tensor_has_one_grid():
    """Otherwise what the pad reads is rounded twice in the program, and once in the model."""
    spec, differing, x = "uint8 affine mse", [], torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rules = [Rule("*", weight="int8 narrow", input=spec), Rule("linear", output=spec)]
    rules += [Rule(name, input=spec) for name in ("layer*.add_0", "mean_0")]
    for phases in (["fold_batch_norm", "calibrate"], ["fold_batch_norm", "calibrate", "share_grids", "round_biases"]):
        torch.manual_seed(0)
        net = randomize(CifarResNet(8, 8)).eval()
        run_phases(net, QuantPlan(rules), [x], phases)
        program = integer_program(net, (x[:1],), [x], XNNPACK)
        with torch.no_grad():
            steps = (outputs(program, x) - net(x)).abs() / net.linear.output_quantizer.scale
        differing.append(float((steps > 0.5).float().mean()))
    assert differing[0] > 0.03
    assert differing[1] == 0


def test_biases_fit_into_int32_next_to_tiny_weights():
    net = network(*EVERYTHING)
    with torch.no_grad():
        net.depthwise.weight[0] *= 1e-12
        net.depthwise.bias[0] = 3.0
        net.depthwise.weight[1] = 0.0
    calibrate(net, [X])
    program = integer_program(net, (X[:1],), [X], XNNPACK)
    names, state = program.graph_signature.inputs_to_buffers, program.state_dict
    for call in nodes(program, "aten.conv2d") + nodes(program, "aten.linear"):
        scale = state[names[call.args[1].args[1].name]].double()
        parameters = names | program.graph_signature.inputs_to_parameters
        bias = state[parameters[call.args[2].name]].double()
        after = next(iter(call.users)).args[1]
        assert (bias.abs() / (scale * call.args[0].args[1])).max() <= 2**30
        assert (scale * call.args[0].args[1] / after).min() >= 2.0**-31
    with torch.no_grad():
        wanted = net(X)
    step = float(net.head.output_quantizer.scale)
    assert ((outputs(program) - wanted).abs() <= 1.01 * step).float().mean() > 0.99


@pytest.mark.parametrize(
    ("weight", "factor"), [("int4 per_channel", 8), ("twn", 64), ("uint4 affine", 8), ("int8 narrow", 1)]
)
def test_small_integers_are_multiplied_for_finer_biases(weight, factor):
    """By a power of two, so that the weights stay bit for bit."""
    net = network(*EVERYTHING, weight=weight)
    program = integer_program(net, (X[:1],), [X], XNNPACK)
    names, state = program.graph_signature.inputs_to_buffers, program.state_dict
    codes, scale = (state[names[node.name]] for node in nodes(program, "aten.linear")[0].args[1].args[:2])
    with torch.no_grad():
        assert torch.equal(codes.float() * scale[:, None], net.head.quantized_weight())
    assert (codes % factor == 0).all()
    assert codes.abs().amax() >= 60


def test_ranges_need_data_and_the_message_says_which():
    with pytest.raises(
        ExportError,
        match=r"(?s)XNNPACK rounds 3 results .*batches=.*depthwise .conv2d., act .hardswish., head .linear.",
    ):
        integer_program(network(), (X[:1],), None, XNNPACK)


def test_nothing_is_missing_where_the_plan_says_everything():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(16, 8)
    prepare(net, QuantPlan([Rule("*", weight="int4", input="uint8 affine"), Rule("2", output="int8")]))
    calibrate(net.eval(), [x])
    program = integer_program(net, (x,), None, TFLITE)
    with torch.no_grad():
        assert torch.equal(program.module(check_guards=False)(x), net(x))


@pytest.mark.parametrize("target", ["executorch", "litert"])
@pytest.mark.parametrize(
    ("layer", "weight", "activation", "message"),
    [
        (
            "stem",
            "int8 per_channel",
            "uint8",
            "-127..127, without -128; the nearest that fits is 'int8 per_channel narrow'",
        ),
        ("stem", "uint8 affine", "uint8", "have zero point 0; the nearest that fits is 'int8 per_channel narrow'"),
        ("stem", "int12 per_channel", "uint8", "at most 8 bits; the nearest that fits is 'int8 per_channel narrow'"),
        (
            "head",
            "int4 group4",
            "uint8",
            "one scale for each output channel; .*'int4 per_channel'",
        ),
        ("stem", "kmeans3", "uint8", "no integers with one scale.*'int3 per_channel'"),
        ("head", "mxfp4", "uint8", "no integers with one scale.*'int4 per_channel'"),
        ("head", "int4 per_channel", None, "multiplies integer weights with integer inputs, and the input is float"),
        ("stem", "int4", "int16", "256 levels of a byte, this has 65536; the nearest that fits is 'uint8 affine'"),
        ("stem", "int4", "uint4", "256 levels of a byte, this has 16; the nearest that fits is 'uint8 affine'"),
        ("depthwise", "int4", "int8 per_channel", "activations of .* have one scale; the nearest that fits"),
    ],
)
def test_what_runtimes_cannot_hold_is_refused_at_plan_time(target, layer, weight, activation, message):
    """Without the packages: nothing of a runtime is imported."""
    net = Net()
    prepare(net, QuantPlan([Rule(layer, weight=weight, input=activation)]))
    (fault,) = TARGETS[target].faults(Request(model=net))
    with pytest.raises(ValueError, match=message):
        raise ValueError(fault)
    assert fault.startswith(f"{layer}.")


TOKEN = "int8 per_token affine dynamic"
FITS = f"; the nearest that fits is '{TOKEN}'"


@pytest.mark.parametrize(
    ("target", "layer", "weight", "act", "message"),
    [
        ("executorch", "head", "int4", TOKEN, None),
        ("executorch", "head", "int4", "uint8 per_token affine dynamic", None),
        ("executorch", "head", "int4", "uint8 affine dynamic", f"each token{FITS}"),
        ("executorch", "head", "int4", "int8 per_token dynamic", f"a zero point of each token{FITS}"),
        ("executorch", "head", "int4", "int4 per_token affine dynamic", f"256 levels of a byte{FITS}"),
        ("executorch", "head", None, TOKEN, "for integer weights, and the weight is float"),
        ("executorch", "stem", "int4", "uint8 affine dynamic", "not for a Conv2d: .* fits is 'uint8 affine'"),
        ("litert", "head", "int4", TOKEN, "litert holds fixed ones; the nearest that fits is 'uint8 affine'"),
    ],
)  # fmt: skip
def test_ranges_that_are_found_at_run_time(target, layer, weight, act, message):
    """XNNPACK finds those of tokens in linear layers; what else a plan asks for is refused with the nearest spec."""
    net = Net()
    prepare(net, QuantPlan([Rule(layer, weight=weight or "float", input=act)]))
    faults = TARGETS[target].faults(Request(model=net))
    if message is None:
        assert not faults
    else:
        with pytest.raises(ValueError, match=message):
            raise ValueError(*faults)


def test_a_plan_for_executorch_has_the_zero_point_of_its_kernels():
    rule = plan_for(QuantPlan.parse("int8 per_channel / int8 per_token narrow dynamic"), "executorch").rules[0]
    assert str(rule.weight) == "int8 per_channel narrow"
    assert str(rule.input) == TOKEN


def test_a_product_of_tokens_is_float_where_the_next_one_is_rounded():
    """A linear layer of tokens, then one with a fixed range: two roundings to a fixed grid, and half bytes are said."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7)).eval(), torch.randn(16, 12)
    fixed = Rule("2", weight="int8 per_channel narrow", input="uint8 affine", output="uint8 affine")
    prepare(net, QuantPlan([Rule("0", weight="int4 per_channel", input=TOKEN), fixed]))
    calibrate(net, [x])
    program = integer_program(net, (x,), [x], XNNPACK)
    assert len(nodes(program, "choose_qparams_per_token")) == 1
    assert len(nodes(program, "quantized_decomposed.quantize_per_tensor")) == 2
    (stored, _) = nodes(program, "dequantize_per_channel")
    assert stored.args[4:6] == (-8, 7)
    with torch.no_grad():
        away = (program.module(check_guards=False)(x) - net(x)).abs() / net[2].output_quantizer.scale
    assert away.max() < 1.01
    assert (away > 0.5).float().mean() < 0.05


@pytest.mark.parametrize("target", ["executorch", "litert"])
def test_other_refusals(target):
    chosen = TARGETS[target]
    net = nn.Sequential(nn.Embedding(8, 4), nn.LSTM(4, 4))
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel")]))
    faults = chosen.faults(Request(model=net))
    assert any("no integer kernel of Embedding: leave its weight float" in fault for fault in faults)
    assert any("no integer kernel of LSTM" in fault for fault in faults)
    (fault,) = chosen.faults(Request(model=network().double()))
    assert "in float64" in fault
    (fault,) = chosen.faults(Request(model=network(), inputs=X))
    assert "got a Tensor: write (x,)" in fault
    (fault,) = chosen.faults(Request({"batch": -1}))
    assert "or 0 for the example's, got -1" in fault
    with pytest.raises(ExportError, match="batch=40, and an example input has the shape"):
        example((X,), 40)
    assert chosen.takes["weight"][0] == "int8 per_channel narrow"


def test_transposed_convolutions_are_float_in_litert():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel narrow", input="uint8 affine")]))
    assert not TARGETS["executorch"].faults(Request(model=net))
    (fault,) = TARGETS["litert"].faults(Request(model=net))
    assert "writes transposed convolutions in float: leave its weight float" in fault


def test_batches_are_cut_into_pieces():
    calls = []

    def run(x, y):
        calls.append(len(x))
        return [x + y]

    whole = in_pieces(run, 4)
    x = torch.arange(8.0)
    assert torch.equal(whole(x, x)[0], 2 * x)
    assert calls == [4, 4]
    with pytest.raises(ExportError, match="takes 4 samples at a time cannot take tensors of shapes"):
        whole(x[:6], x[:6])


def test_what_torch_cannot_trace_is_said():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.a(-x)

    net, x = Branch(), torch.ones(2, 4)
    prepare(net, QuantPlan([Rule("*", weight="int4", input="uint8")]))
    calibrate(net.eval(), [x])
    with pytest.raises(ExportError, match=r"torch.export cannot follow Branch.forward"):
        integer_program(net, (x,), [x], XNNPACK)
