"""Layers that count bits, beside the fake-quantized layers and beside torch alone."""

import copy

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export.xnor.kernel import interleave, kernel, pack_signs, unpack_signs
from lq_plugin.export.xnor.layers import XNORConv, XNORLinear, use_xnor, xnor_layer
from lq_plugin.native.variants import VARIANTS

try:
    RUNS = kernel().variants
except ExportError as error:
    RUNS, WHY = (), str(error)
VARIANT = [pytest.param(v, marks=[] if v in RUNS else pytest.mark.skip(reason=f"no {v} here")) for v in VARIANTS]

LAYERS = {
    "linear": (lambda bias: nn.Linear(131, 21, bias=bias), (5, 131)),
    "linear, 3 dims": (lambda bias: nn.Linear(64, 8, bias=bias), (2, 3, 64)),
    "conv1d": (lambda bias: nn.Conv1d(3, 9, 5, 2, 2, bias=bias), (2, 3, 17)),
    "conv2d": (lambda bias: nn.Conv2d(70, 12, 3, bias=bias), (2, 70, 7, 6)),
    "conv2d, padded": (lambda bias: nn.Conv2d(5, 17, 3, (2, 1), (1, 2), bias=bias), (2, 5, 8, 9)),
    "conv2d, dilated, same": (lambda bias: nn.Conv2d(5, 8, 3, padding="same", dilation=2, bias=bias), (1, 5, 9, 9)),
    "conv3d": (lambda bias: nn.Conv3d(4, 3, 2, padding=1, bias=bias), (2, 4, 3, 4, 5)),
}


def quantized(kind, weight, inputs, bias=False):
    """A layer with exact zeros among its inputs, and one NaN-free batch."""
    make, shape = LAYERS[kind]
    torch.manual_seed(len(kind))
    net, x = nn.Sequential(make(bias)), torch.randn(shape).round(decimals=1)
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(net, [x])
    return net.eval(), x


@pytest.mark.parametrize("variant", VARIANT)
@pytest.mark.parametrize(
    ("rows", "outputs", "elements"), [(1, 1, 1), (1, 8, 64), (3, 13, 200), (11, 16, 513), (33, 7, 4096)]
)
def test_every_variant_multiplies_signs(variant, rows, outputs, elements):
    generator = torch.Generator().manual_seed(elements)
    x, w = torch.randn(rows, elements, generator=generator), torch.randn(outputs, elements, generator=generator)
    x[0, 0] = 0.0
    scale, bias = torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)
    count = kernel(variant)
    assert torch.equal(count.pack(x), pack_signs(x))
    signs = torch.where(x >= 0, 1.0, -1.0) @ torch.where(w >= 0, 1.0, -1.0).t()
    weights = interleave(pack_signs(w))
    assert torch.equal(count.matmul(count.pack(x), weights, outputs, elements), signs)
    assert torch.equal(count.linear(x, weights, outputs, scale, bias), signs * scale + bias)
    assert torch.equal(count.linear(x, weights, outputs, bias=bias), signs + bias)


@pytest.mark.skipif(not RUNS, reason="no compiler")
@pytest.mark.parametrize("kind", LAYERS)
def test_signs_without_scale_equal_the_quantized_layer_bit_for_bit(kind):
    net, x = quantized(kind, "sign", "sign")
    assert torch.equal(xnor_layer(net[0], native=True)(x), net(x))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("weight", "inputs"), [("sign", "xnor"), ("bwn", "sign"), ("bwn per_tensor", "xnor")])
def test_scales_and_bias(kind, weight, inputs):
    net, x = quantized(kind, weight, inputs, bias=True)
    ours = xnor_layer(net[0], native=False)(x)
    torch.testing.assert_close(ours, net(x).detach(), rtol=1e-5, atol=1e-5)
    if RUNS:
        assert torch.equal(xnor_layer(net[0], native=True)(x), ours), "the kernel and torch differ"


@pytest.mark.skipif(not RUNS, reason="no compiler")
def test_a_convolution_follows_the_size_of_its_input():
    net, x = quantized("conv2d, padded", "sign", "sign")
    layer = xnor_layer(net[0], native=True)
    for image in (x, x[:1, :, :5], x[0], x.to(memory_format=torch.channels_last), x):
        y = layer(image)
        assert torch.equal(y, net(image))
        assert y.is_contiguous()


def test_a_model_keeps_its_other_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(32, 4, bias=False), nn.Linear(4, 2)
    )
    x = torch.randn(2, 3, 6, 6)
    prepare(
        net,
        QuantPlan(
            [
                Rule("*", weight="sign", input="sign"),
                Rule("0", weight="int8", input="uint8 affine"),
                Rule("4", input="float"),
            ]
        ),
    )
    calibrate(net, [x])
    expected = net.eval()(x)
    assert use_xnor(net, native=False) == ["1", "3"]
    assert isinstance(net[1], XNORConv)
    assert isinstance(net[3], XNORLinear)
    assert torch.equal(net(x), expected)
    assert net[3].words.numel() * 64 == 4 * 64  # one word for each of the 4 outputs
    state = copy.deepcopy(net.state_dict())
    net.load_state_dict(state)
    assert torch.equal(net(x), expected)


def test_refused_with_every_reason():
    net = nn.Sequential(
        nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv2d(4, 4, 1, groups=2), nn.Embedding(4, 16)
    )
    plan = [
        Rule("*", weight="sign", input="sign"),
        Rule("0", weight="int4", input="sign"),
        Rule("1", weight="bwn group8"),
        Rule("2", input="float"),
        Rule("4", input="float"),
    ]
    prepare(net, QuantPlan(plan))
    with pytest.raises(
        ExportError,
        match=r"0: its weight is 'int4(.|\n)*1: .*whole rows(.|\n)*2: its input is float(.|\n)*3: groups=2(.|\n)*4: "
        r".*no kernel",
    ):
        use_xnor(net, native=False)
    with pytest.raises(ExportError, match="it has no quantized layers"):
        use_xnor(nn.Linear(2, 2), native=False)


def test_without_a_compiler(monkeypatch):
    net, x = quantized("linear", "sign", "sign")

    def broken(variant=None):
        raise ExportError("the XNOR kernel needs a C++ compiler and ninja: none")

    monkeypatch.setattr("lq_plugin.export.xnor.layers.kernel", broken)
    with pytest.raises(ExportError, match="compiler"):
        xnor_layer(net[0], native=True)
    with pytest.warns(RuntimeWarning, match="computed by torch"):
        layer = xnor_layer(net[0])
    assert torch.equal(layer(x), net(x))


@pytest.mark.skipif(not RUNS, reason="no compiler")
def test_a_variant_that_is_not_there():
    with pytest.raises(ExportError, match="this processor runs"):
        kernel("neon")


def test_pack_and_unpack():
    x = torch.randn(3, 5, 130)
    assert torch.equal(unpack_signs(pack_signs(x), 130), torch.where(x >= 0, 1.0, -1.0))
