"""Training under autocast: what each layer multiplies is what the float32 path gives, rounded to autocast's dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.layers.conv import QuantizedConv2d
from lq_plugin.layers.linear import QuantizedLinear
from lq_plugin.model import commit_observers, quantizers
from lq_plugin.native import available, use_native
from lq_plugin.quantizers import ActivationQuantizer

if not available():
    pytest.skip("no C++ compiler", allow_module_level=True)

PLANS = {
    "w8a8": "w8a8",
    "lsq": QuantPlan([Rule("*", weight="int4 per_channel lsq", input="int4 lsq")]),
    "mx6": QuantPlan([Rule("*", weight="mx6", input="mx6")]),
    "mxfp8": QuantPlan([Rule("*", weight="mxfp8", input="mxfp8")]),
}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.layers(x)).mean(1)


MODELS = {
    "convolutions": (lambda: CifarResNet(8), (4, 3, 16, 16)),
    "encoder": (Encoder, (4, 6, 32)),
}


def training(model, plan, x):
    prepare(model, plan if isinstance(plan, QuantPlan) else QuantPlan.parse(plan))
    calibrate(model, [x])
    model.train()
    for quantizer in quantizers(model):
        quantizer.observing = isinstance(quantizer, ActivationQuantizer)
    return model


def step(model, x, dtype):
    """The loss, all gradients and ranges of one step."""
    with torch.autocast("cpu", dtype):
        y = model(x)
    loss = F.cross_entropy(y.float(), torch.arange(4) % 5)
    loss.backward()
    commit_observers(quantizers(model))
    return [loss.detach(), *(p.grad for p in model.parameters()), *(b for b in model.buffers())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_kernels_and_torch_operations_train_alike(model, plan, dtype):
    """Bit for bit; the torch operations are those of float32 with a cast behind them."""
    if model == "convolutions" and plan.startswith("mx"):
        pytest.skip("torch operations in blocks lay out images otherwise, which torch's convolutions sum otherwise")
    (make, shape), plan = MODELS[model], PLANS[plan]
    torch.manual_seed(0)
    x = torch.randn(shape)
    first = training(make(), plan, x)
    second = copy.deepcopy(first)
    with use_native(True):
        mine = step(first, x, dtype)
    for quantizer in quantizers(second):
        quantizer.casts = False
    with use_native(False):
        theirs = step(second, x, dtype)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in first.parameters())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_by_hand(dtype, native):
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    layer = training(nn.Sequential(nn.Linear(16, 6)), "w4a8", x)[0]
    scale, zero_point = layer.input_quantizer.scale.clone(), layer.input_quantizer.zero_point.clone()
    grid = layer.input_quantizer.spec.grid
    level = (x / scale).round().clamp(grid.quant_min - zero_point, grid.quant_max - zero_point) * scale
    weight = layer.weight.detach()
    step_size = (weight.amax(1) / 7).maximum(weight.amin(1) / -8)[:, None]
    rounded = (weight * (1 / step_size)).round().clamp(-8, 7) * step_size
    v = x.requires_grad_()
    with use_native(native), torch.autocast("cpu", dtype):
        y = layer(v)
    wanted = F.linear(level.to(dtype), rounded.to(dtype), layer.bias.detach().to(dtype))
    assert torch.equal(y, wanted)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.equal(v.grad, (upstream @ rounded.to(dtype)).float())
    assert torch.equal(layer.weight.grad, (upstream.t() @ level.to(dtype)).float())


def seen_by(model, x):
    """Dtypes of what the quantizers give."""
    found = {}
    handles = [
        q.register_forward_hook(lambda module, args, y, name=q.name: found.__setitem__(name, y.dtype))
        for q in quantizers(model)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    for handle in handles:
        handle.remove()
    return found


def test_operands_are_written_in_the_dtype_that_they_are_read_in():
    x = torch.randn(4, 6, 32)
    model = training(Encoder(), "w8a8", x)
    assert set(seen_by(model, x).values()) == {torch.bfloat16}
    # Without gradients a weight may be wanted as it is stored.
    with torch.no_grad():
        assert torch.float32 in seen_by(model, x).values()
    assert set(seen_by(model.eval(), x).values()) >= {torch.float32}


def test_what_autocast_does_not_cast_stays_float32():
    class OwnForward(QuantizedLinear):
        def forward(self, input):
            with torch.autocast("cpu", enabled=False):
                return F.linear(input.float(), self.quantized_weight())

    class OwnConvolution(QuantizedConv2d):
        def _conv_forward(self, input, weight, bias):
            with torch.autocast("cpu", enabled=False):
                return super()._conv_forward(input.float(), weight, bias)

    assert QuantizedLinear(3, 4).casts_operands()
    assert QuantizedConv2d(3, 4, 3).casts_operands()
    assert not OwnForward(3, 4).casts_operands()
    assert not OwnConvolution(3, 4, 3).casts_operands()
    index, x = torch.tensor([[1, 2]]), torch.randn(1, 3, 8, 8)
    seen = seen_by(training(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)), "w8", index), index)
    assert seen == {"0.weight": torch.float32, "1.weight": torch.bfloat16}
    seen = seen_by(training(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3)), "w8a8", x), x)
    assert (seen["0.weight"], seen["1.weight"]) == (torch.bfloat16, torch.float32)


def test_what_is_kept_for_the_backward_pass():
    """Besides what the float layer keeps: one bit of each input element, and a quantized tensor of 16 bits."""
    x = torch.randn(64, 32, requires_grad=True)
    layer = training(nn.Sequential(nn.Linear(32, 48)), "w8a8", x.detach())
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with use_native(True), hooks, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    sizes = [t.numel() * t.element_size() for t in kept if t.dtype != torch.float32]
    assert sorted(sizes) == sorted([x.numel() // 8, 2 * x.numel(), 2 * 32 * 48])


def test_a_model_of_16_bits():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    first = training(CifarResNet(8), "w8a8", x).bfloat16()
    second = copy.deepcopy(first)
    outcomes = []
    for model, on in ((first, True), (second, False)):
        with use_native(on):
            loss = F.cross_entropy(model(x.bfloat16()).float(), torch.arange(4))
            loss.backward()
            commit_observers(quantizers(model))
        outcomes.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert all(p.grad.dtype == torch.bfloat16 for p in first.parameters())
    assert all(b.dtype == torch.float32 for q in quantizers(first) for b in q.buffers() if b.is_floating_point())
