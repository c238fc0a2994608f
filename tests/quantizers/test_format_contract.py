"""One contract for all formats and all layer types."""

import copy

import pytest
import torch
from torch import nn

from lq_plugin import CalibrationError, PlanError, QuantPlan, QuantSpec, Rule, calibrate, prepare, remove
from lq_plugin.intent.formats import FORMATS, RANGES
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.fidelity import layer_fidelity
from lq_plugin.model.training import commit_observers
from lq_plugin.quantizers import make_weight_quantizer
from lq_plugin.quantizers.registry import format_code

WEIGHTS = [
    "int4 per_channel mse",
    "int2 per_channel lsq",
    "int4 per_channel stochastic",
    "int3 mse mad",
    "int3 mse identity",
    "int4 group16:4 ragged",
    "mx9",
    "mx4",
    "mxfp8_e4m3",
    "mxfp8_e5m2:rceil",
    "mxfp6_e3m2:even",
    "mxfp6_e2m3",
    "mxfp4:ceil",
    "mxfp4:mse",
    "mxint8",
    "nvfp4",
    "nvfp4:unit",
    "nvfp4:four_six",
    "if4",
    "fp8",
    "fp8:e5m2 per_channel percentile:99",
    "fp8 group16 ragged",
    "fp8 block8",
    "sign",
    "sign stochastic:3",
    "sign:0.1 identity",
    "bwn",
    "bwn:paper per_tensor",
    "bwn group8 ragged",
    "twn",
    "twn:exact per_channel",
    "twn group8 ragged",
    "ttq",
    "ttq:0.1 per_channel",
    "seq",
    "seq per_channel mse",
    "seq:ternary per_channel lsq",
    "seq:ternary group8 ragged",
    "q4_0",
    "q8_0",
    "tq1_0",
    "tq2_0:exact identity",
    "tq2_0:max",
    "kmeans2",
    "kmeans3:linear:mean",
    "kmeans2:quantile:sum:reassign per_channel",
    "kmeans1 group4",
    "kmeans1:linear:reassign group4",
]
INPUTS = [
    "uint8 affine mse stochastic",
    "int4 group16:4",
    "mx6",
    "mxfp8",
    "mxfp4:rceil",
    "mxint8",
    "nvfp4",
    "nvfp4:four_six",
    "if4",
    "fp8 ema",
    "fp8:e5m2 per_channel percentile:99",
    "fp8 dynamic",
    "fp8 group8 dynamic",
    "int8 dynamic",
    "uint8 affine dynamic",
    "int4 per_channel dynamic",
    "int8 group16 dynamic stochastic",
    "sign",
    "sign stochastic",
    "sign:-0.2",
    "xnor",
]
LAYERS = {
    "linear": (lambda: nn.Linear(20, 6), (5, 20)),
    "conv1d": (lambda: nn.Conv1d(20, 6, 3), (2, 20, 9)),
    "conv2d": (lambda: nn.Conv2d(20, 6, 3), (2, 20, 5, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(20, 6, 3), (2, 20, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(20, 20, 3, groups=20), (2, 20, 5, 5)),
}


def ready(layer, plan, x):
    net = nn.Sequential(layer)
    prepare(net, plan)
    calibrate(net, [x])
    return net


def test_every_format_is_covered():
    assert {QuantSpec.parse(text).format_name for text in (*WEIGHTS, *INPUTS)} == set(FORMATS)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights(spec, kind):
    if kind == "depthwise" and ("group8" in spec or "group4" in spec or "fp8 group" in spec or spec == "tq1_0"):
        pytest.skip(
            "its filters have one input channel: a float scale or table, or a block of 52 bytes, for each weight"
        )
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    before = copy.deepcopy(layer.state_dict())
    net = ready(layer, QuantPlan([Rule("*", weight=spec)]), x)
    net.eval()
    y = net(x)
    weight = layer.quantized_weight().detach()
    assert weight.shape == layer.weight.shape
    assert not torch.equal(weight, layer.weight)
    assert torch.equal(net(x), y), "evaluation is deterministic"

    # Its levels: no more different values a unit of the granularity than the bits allow.
    parsed = layer.weight_quantizer.spec
    if parsed.format_name in ("sign", "bwn", "twn", "ttq", "kmeans"):
        units = layer.weight_quantizer.scale_shape
        assert len(weight.unique()) <= 2**parsed.bit_width * torch.Size(units).numel()

    # Another process: a new model, the saved state, bit-equal answers.
    other = nn.Sequential(make())
    prepare(other, QuantPlan([Rule("*", weight=spec)]))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), y)

    # Gradients come to the weight, or to the centroids that stand for it.
    net.train()
    net(x).square().sum().backward()
    trained = [p for p in net.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) >= 2, "the bias and one more"
    assert all(torch.isfinite(p.grad).all() for p in trained)
    assert 0 < cost(net).effective_bits < 32
    (row,) = layer_fidelity(net)
    assert torch.isfinite(torch.tensor(row.sqnr_db))
    assert torch.isfinite(torch.tensor([row.minimum, row.maximum, row.scale_min, row.scale_max])).all()
    remove(net)
    assert all(torch.equal(before[key], value) for key, value in net[0].state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("spec", INPUTS)
def test_inputs(spec, kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    float_y = layer(x).detach()
    net = ready(layer, QuantPlan([Rule("*", input=spec)]), x).eval()
    y = net(x)
    assert y.shape == float_y.shape
    assert not torch.equal(y, float_y)
    other = nn.Sequential(make())
    prepare(other, QuantPlan([Rule("*", input=spec)]))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), y)
    x.requires_grad_()
    net.train()(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any()


@pytest.mark.parametrize("spec", WEIGHTS)
def test_embeddings(spec):
    torch.manual_seed(0)
    layer = nn.Embedding(12, 20)
    net = ready(layer, QuantPlan([Rule("*", weight=spec)]), torch.arange(12)).eval()
    torch.testing.assert_close(net(torch.tensor([3, 3])), layer.quantized_weight()[[3, 3]])


ESTIMATED = [
    *(f"uint8 affine {name}" for name in RANGES if name != "pact"),
    "uint4 pact",
    "int8 per_channel ema",
    "int4 lsq per_channel",
]


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("spec", INPUTS + ESTIMATED)
def test_empty_inputs_pass_and_move_no_range(spec, kind):
    """An expert without tokens, an image without proposals: the output of the float layer, and nothing learned from
    it."""
    if spec == "xnor" and kind == "conv_transpose2d":
        pytest.skip("it scales the output of plain layers")
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    net, x = nn.Sequential(make()), torch.randn(shape)
    empty = x[:0]
    prepare(net, QuantPlan([Rule("*", weight="int8 per_channel", input=spec)]))
    quantizer = net[0].input_quantizer
    quantizer.observing = True

    # Before there are ranges: neither an error nor the first one.
    assert torch.equal(net.eval()(empty), nn.Sequential(make())(empty))
    net.train()(empty)
    commit_observers([quantizer])
    assert not (quantizer.needs_calibration and quantizer.is_calibrated)

    calibrate(net, [empty, x, empty])
    state = {key: value for key, value in copy.deepcopy(net.state_dict()).items() if "draws" not in key}
    once = nn.Sequential(make())
    prepare(once, QuantPlan([Rule("*", weight="int8 per_channel", input=spec)]))
    calibrate(once, [x])
    assert all(
        torch.equal(value, state[key])
        for key, value in once.state_dict().items()
        if "input_quantizer" in key and key in state
    )

    empty.requires_grad_()
    net.train()(empty).sum().backward()
    commit_observers([quantizer])
    assert empty.grad.shape == empty.shape
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())
    assert net.eval()(empty).shape == nn.Sequential(make())(empty).shape
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("spec", ["bwn", "twn", "ttq", "kmeans2", "sign", "mxfp4", "nvfp4"])
def test_bad_weights_are_refused_with_the_name(spec):
    layer = nn.Linear(8, 8)
    layer.weight.data[0, 0] = float("nan")
    net = nn.Sequential(layer)
    prepare(net, QuantPlan([Rule("*", weight=spec)]))
    with pytest.raises(CalibrationError, match=r"0\.weight"):
        calibrate(net, [torch.randn(2, 8)])


@pytest.mark.parametrize("spec", ["bwn", "twn", "ttq", "kmeans2"])
def test_formats_for_weights_are_refused_as_inputs(spec):
    with pytest.raises(PlanError, match=f"'{spec}' is for weight, not for its input"):
        prepare(nn.Sequential(nn.Linear(4, 4)), f"int8 / {spec}")


@pytest.mark.parametrize("spec", WEIGHTS + INPUTS)
def test_specs_are_written_and_read_back(spec):
    parsed = QuantSpec.parse(spec)
    assert QuantSpec.parse(str(parsed)) == parsed


def test_words_of_a_format():
    assert str(QuantSpec.parse("mxfp8")) == "mxfp8_e4m3"
    assert QuantSpec(format="kmeans:linear", bit_width=3) == QuantSpec.parse("kmeans3:linear")
    assert QuantSpec(format="bwn").granularity == QuantSpec.parse("bwn per_channel").granularity
    assert str(QuantSpec.parse("bwn per_tensor")) == "bwn per_tensor"
    assert QuantSpec.parse("int4 stochastic:7").seed == 7


@pytest.mark.parametrize("written", ["twn", "ttq", "kmeans2", "mxfp4", "mxint8", "nvfp4", "fp8", "tq1_0", "tq2_0"])
def test_the_default_options_are_those_of_a_format_without_options(written):
    options = format_code(QuantSpec.parse(written)).default_options
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    results = []
    for text in (written, f"{written}:{options}"):
        quantizer = make_weight_quantizer(QuantSpec.parse(text), "weight", tuple(weight.shape))
        quantizer.calibrate(weight)
        results.append(quantizer.eval()(weight))
    assert options
    assert torch.equal(*results)


@pytest.mark.parametrize("spec", ["bwn group8 ragged", "twn group8 ragged"])
def test_padding_of_a_ragged_group_has_no_part_in_its_scale(spec):
    layer = nn.Linear(11, 2)
    prepare(nn.Sequential(layer), QuantPlan([Rule("*", weight=spec)]))
    tail = nn.Linear(3, 2)
    tail.weight.data = layer.weight.data[:, 8:].clone()
    prepare(nn.Sequential(tail), QuantPlan([Rule("*", weight=spec.replace("group8 ragged", "group3"))]))
    torch.testing.assert_close(layer.quantized_weight()[:, 8:], tail.quantized_weight())


def test_codebooks_follow_the_weight_where_they_are_told_to():
    layer = nn.Linear(30, 30)
    net = nn.Sequential(layer)
    prepare(net, QuantPlan([Rule("*", weight="kmeans2:exact:sum:reassign")]))
    layer.calibrate_weight()
    quantizer = layer.weight_quantizer
    table = quantizer.centroids.detach().clone()
    with torch.no_grad():
        layer.weight.neg_()
        quantizer.centroids.copy_(table.flip(1))  # no longer in order, as after training
    quantizer.new_epoch(layer.weight)
    distance = (layer.weight.detach().flatten()[:, None] - table.flip(1)).abs()
    assert torch.equal(quantizer.indices.flatten().long(), distance.argmin(1))
    assert torch.equal(quantizer.centroids, table.flip(1))
