"""Self-attention whose projections are summed with integers, against torch's own attention on fake-quantized
operands."""

import copy

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.layers.integer import enable_integer_forward, integer_report
from lq_plugin.layers.integer.kernels import integer_kernels, sums_exactly
from lq_plugin.model import quantizers
from lq_plugin.quantizers import ActivationQuantizer

pytestmark = pytest.mark.skipif(isinstance(integer_kernels(), str), reason=str(integer_kernels()))
#: Without VNNI, products of 8 bits saturate in torch, and those of 7 are computed with integers.
WEIGHT = f"int{8 if sums_exactly(127) else 7} per_channel"
BATCH, LENGTH, WIDTH, HEADS = 3, 5, 12, 2
PADDING = torch.tensor([[False] * 5, [False, False, True, True, True], [False] * 4 + [True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "padding that is added": {"key_padding_mask": torch.zeros(BATCH, LENGTH).masked_fill(PADDING, -torch.inf)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal, said by the mask alone": {"attn_mask": CAUSAL},
    "boolean": {"attn_mask": CAUSAL < 0},
    "for each head": {
        "attn_mask": torch.randn(BATCH * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))
    },
    "causal and padding": {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING, "is_causal": True},
    "for each head and padding": {
        "attn_mask": torch.randn(BATCH * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)),
        "key_padding_mask": torch.zeros(BATCH, LENGTH).masked_fill(PADDING, -torch.inf),
    },
}


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, x, **options):
        return self.attention(x, x, x, **{"need_weights": False, **options})[0]


def prepared(net, x, out=WEIGHT):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases are 0 at first
    prepare(net, QuantPlan([Rule("*", weight=WEIGHT, input="uint8 affine ema"), Rule("*out_proj", weight=out)]))
    calibrate(net, [x])
    for quantizer in quantizers(net):
        quantizer.observing = isinstance(quantizer, ActivationQuantizer)
    return net.train()


def step(net, x, **options):
    x = x.clone().requires_grad_()
    y = net(x, **options)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(
        y, [x, *parameters], torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    )
    return [
        y.detach(),
        *gradients,
        *(q.batch_max.clone() for q in quantizers(net) if isinstance(q, ActivationQuantizer)),
    ]


def assert_same_step(net, x, **options):
    integer = copy.deepcopy(net)
    enable_integer_forward(integer, True)
    for ours, theirs in zip(step(integer, x, **options), step(net, x, **options), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1e-12)
    return integer_report(integer)["attention.in_proj_weight"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"batch_first": True, "bias": False}], ids=str)
def test_self_attention(mask, options):
    shape = (BATCH, LENGTH, WIDTH) if options.get("batch_first") else (LENGTH, BATCH, WIDTH)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert assert_same_step(prepared(Net(**options), x), x * 1.1, **MASKS[mask]) == "integer"


def test_a_float_projection_of_the_output():
    x = torch.randn(BATCH, LENGTH, WIDTH)
    assert assert_same_step(prepared(Net(batch_first=True), x, "float"), x) == "integer"


@pytest.mark.parametrize(
    ("options", "call"),
    [({"add_bias_kv": True}, {}), ({"add_zero_attn": True}, {}), ({}, {"need_weights": True})],
    ids=["bias of keys", "zeros", "weights are read"],
)
def test_what_is_not_covered_says_why(options, call):
    x = torch.randn(BATCH, LENGTH, WIDTH)
    report = assert_same_step(prepared(Net(batch_first=True, **options), x), x, **call)
    assert "fake-quantized where it is not self-attention" in report


def test_wrong_masks_are_torchs_to_refuse():
    x = torch.randn(BATCH, LENGTH, WIDTH)
    net = prepared(Net(batch_first=True), x)
    enable_integer_forward(net, True)
    with pytest.raises(RuntimeError, match="should be"):
        net(x, attn_mask=torch.zeros(1, LENGTH))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        net(x, is_causal=True)


def test_dropout_draws_and_an_encoder_layer_learns_alike():
    """The same seed drops other elements, for the scores lie in memory otherwise: what is compared is what training
    reaches."""
    x = torch.randn(64, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))
    losses = {}
    for integer in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.1, batch_first=True), nn.Linear(WIDTH, WIDTH)
        )
        prepare(net, QuantPlan([Rule("*", weight=WEIGHT, input="uint8 affine ema")]))
        calibrate(net, [x])
        if integer:
            enable_integer_forward(net.train(), True)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (net.train()(x) - x.flip(1)).square().mean()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses[integer] = float((net.eval()(x) - x.flip(1)).square().mean())
        if integer:
            assert integer_report(net)["0.self_attn.in_proj_weight"] == "integer"
    assert losses[False] < 0.5 * float((x - x.flip(1)).square().mean())
    assert losses[True] == pytest.approx(losses[False], rel=0.15)
