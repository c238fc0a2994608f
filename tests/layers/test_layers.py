"""Quantized layers against the float layer run on weights and inputs quantized by numpy."""

import copy
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import CalibrationError, PlanError, QuantizationError, QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.functional.grouping import blocks
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model import float_forward


class Standardized(nn.Conv2d):
    """A subclass whose forward does more than the plain convolution."""

    def forward(self, input):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(input, w, self.bias)


class Conv1D(nn.Module):
    """Hugging Face's layer, by its published definition."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class GraphLinear(nn.Module):
    """torch_geometric's layer: no `nn.Linear`, and with hooks of its own for loading and saving."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination.update({f"{prefix}weight": self.weight.detach(), f"{prefix}bias": self.bias.detach()})

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.in_channels = state_dict[f"{prefix}weight"].shape[-1]
        super()._load_from_state_dict(state_dict, prefix, *args)


GraphLinear.__module__, GraphLinear.__qualname__ = "torch_geometric.nn.dense.linear", "Linear"


@pytest.fixture(autouse=True)
def importable_conv1d(monkeypatch):
    """Pickle looks the class up where it says it lives."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    for name in ("torch_geometric", "torch_geometric.nn", "torch_geometric.nn.dense"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    linear = types.ModuleType("torch_geometric.nn.dense.linear")
    linear.Linear = GraphLinear
    monkeypatch.setitem(sys.modules, "torch_geometric.nn.dense.linear", linear)


LAYERS = {
    "Linear": (lambda: nn.Linear(12, 8), (4, 12), 0, ()),
    "Linear no bias": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12), 0, ()),
    "Conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 10), 0, ()),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 8, 9, 9), 0, ()),
    "Conv2d grouped": (lambda: nn.Conv2d(8, 8, 3, groups=4), (2, 8, 9, 9), 0, ()),
    "Conv2d depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9), 0, ()),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 5, 5, 5), 0, ()),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 6, 3, stride=2), (2, 8, 7), 1, ()),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), (2, 8, 5, 5), 1, ()),
    "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), (2, 8, 5, 5), None, ()),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 4, 4, 4), 1, ()),
    "Embedding": (lambda: nn.Embedding(20, 8), None, 0, ()),
    "subclass": (lambda: Standardized(8, 6, 3), (2, 8, 9, 9), 0, ()),
    "HF Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12), 1, ()),
    "PyG Linear": (lambda: GraphLinear(12, 8), (2, 3, 12), 0, ()),
}


def data(shape):
    return torch.randint(0, 20, (3, 5)) if shape is None else torch.randn(shape)


@pytest.fixture(params=LAYERS, ids=list(LAYERS))
def case(request):
    torch.manual_seed(0)
    make, shape, axis, _ = LAYERS[request.param]
    return make(), data(shape), axis


def numpy_per_channel(weight, axis, bits):
    """Symmetric full-range quantization with one scale for each slice of the output-channel axis."""
    w = np.moveaxis(weight.detach().numpy().astype(np.float64), axis, 0)
    flat = w.reshape(w.shape[0], -1)
    high = 2 ** (bits - 1)
    scale = np.maximum(flat.max(1).clip(0) / (high - 1), (-flat.min(1)).clip(0) / high).astype(np.float32)
    q = np.clip(np.rint(flat.astype(np.float32) * (np.float32(1) / scale)[:, None]), -high, high - 1)
    return torch.from_numpy(np.moveaxis((q * scale[:, None]).astype(np.float32).reshape(w.shape), 0, axis).copy())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_only_equals_the_float_layer_with_quantized_weight(case, bits):
    layer, x, axis = case
    if axis is None:
        pytest.skip("grouped transposed convolution: see test_grouped_transpose_channels")
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(numpy_per_channel(layer.weight, axis, bits))
    net = nn.Sequential(layer)
    prepare(net, f"w{bits}")
    assert isinstance(layer, QuantizedLayer)
    torch.testing.assert_close(net(x), reference(x), rtol=1e-6, atol=1e-6)


def test_grouped_transpose_channels():
    """Each output channel of each group has a scale of its own, although they share axis 1 of the weight."""
    layer = nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False)
    with torch.no_grad():
        layer.weight[4:] *= 100.0  # the second group
    parts = [nn.ConvTranspose2d(4, 3, 3, bias=False) for _ in range(2)]
    for index, part in enumerate(parts):
        part.weight = nn.Parameter(layer.weight.detach()[4 * index : 4 * index + 4].clone())
    net, halves = nn.Sequential(layer), nn.ModuleList(parts)
    prepare(net, "w4")
    prepare(halves, "w4")
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(net(x), torch.cat([parts[0](x[:, :4]), parts[1](x[:, 4:])], dim=1))


def test_calibrated_input_and_weight(case):
    layer, x, axis = case
    if axis is None or not x.is_floating_point():
        pytest.skip("no float input, or no plain channel axis")
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(numpy_per_channel(layer.weight, axis, 8))
    net = nn.Sequential(layer).eval()
    prepare(net, "int8 per_channel / uint8 affine minmax")
    calibrate(net, [x])
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high / 255 - low / 255).item()
    xq = torch.fake_quantize_per_tensor_affine(x, scale, round(-low.item() / scale), 0, 255)
    torch.testing.assert_close(net(x), reference(xq), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["w4a8", "int4 group3 ragged octav / int8 per_channel", "w4 per_channel lsq a4 lsq"])
def test_disabled_is_bit_equal_and_remove_gives_the_layer_back(case, plan):
    layer, x, _ = case
    net = nn.Sequential(layer)
    float_type, parameters = type(layer), dict(layer.named_parameters())
    want = net(x)
    prepare(net, plan)
    calibrate(net, [x])
    with float_forward(net):
        assert torch.equal(net(x), want)
    assert not torch.equal(net(x), want)
    remove(net)
    assert type(layer) is float_type
    assert torch.equal(net(x), want)
    assert {k: id(v) for k, v in layer.named_parameters()} == {k: id(v) for k, v in parameters.items()}
    assert [name for name, _ in layer.named_modules()] == [""]


def test_identity_hooks_keys_and_gradients_survive(case):
    layer, x, _ = case
    weight, seen = layer.weight, []
    layer.register_forward_hook(lambda *a: seen.append(1))
    net = nn.Sequential(layer)
    prepare(net, "w4a8")
    calibrate(net, [x])
    assert net[0] is layer
    assert layer.weight is weight
    assert {"0.weight"} <= set(net.state_dict())
    seen.clear()
    net(x).square().sum().backward()
    assert seen
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_deepcopy_and_pickle(case):
    layer, x, _ = case
    net = nn.Sequential(layer)
    prepare(net, "w4a8")
    calibrate(net, [x])
    net.eval()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        assert twin[0].weight is not layer.weight
        remove(twin)
        assert not isinstance(twin[0], QuantizedLayer)
    assert isinstance(net[0], QuantizedLayer)


def test_group_scales_against_plain_loops():
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 3, 2, bias=False)
    net = nn.Sequential(layer)
    prepare(net, "int4 group2 ragged")
    got = layer.quantized_weight().detach()
    w = layer.weight.detach()
    for o in range(3):
        for i in range(2):
            for j in range(2):
                for start in (0, 2, 4):
                    part = w[o, start : start + 2, i, j]
                    scale = max(part.max().clamp(min=0) / 7, -part.min().clamp(max=0) / 8)
                    want = torch.clamp(torch.round(part * (1 / scale)), -8, 7) * scale
                    torch.testing.assert_close(got[o, start : start + 2, i, j], want, rtol=1e-6, atol=0)


def test_uncalibrated_evaluation_names_the_layer():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prepare(net, "w4a8")
    with pytest.raises(CalibrationError, match=r"0\.input .* has no range yet: calibrate first"):
        net.eval()(torch.randn(2, 4))


def test_nan_and_inf_are_refused_with_the_layers_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prepare(net, "w4 mse a8")
    for bad in (torch.nan, torch.inf):
        with pytest.raises(CalibrationError, match=r"0\.input"):
            calibrate(net, [torch.full((2, 4), bad)])
        broken = copy.deepcopy(net)
        broken[1].weight.data[0, 0] = bad
        with pytest.raises(CalibrationError, match=r"1\.weight"):
            calibrate(broken, [torch.randn(2, 4)])


def test_kwargs_only_call_of_a_shadowed_layer_is_refused():
    net = nn.Sequential(Standardized(8, 6, 3))
    prepare(net, "w4a8")
    with pytest.raises(TypeError, match="first positional argument"):
        net[0](input=torch.randn(1, 8, 5, 5))
    assert "weight" not in net[0].__dict__


def test_frozen_layer_gets_no_trainable_scales():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    prepare(net, QuantPlan([Rule("*", weight="int4 lsq", input="int4 lsq")]))
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trainable == ["1.weight", "1.bias", "1.weight_quantizer.scale", "1.input_quantizer.scale"]


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv2d(5, 3, 1, bias=False), (4, 5, 6, 7), 1),
        (nn.Conv1d(5, 3, 1, bias=False), (5, 9), 0),  # unbatched
        (nn.Linear(5, 3, bias=False), (4, 6, 5), 2),
        (nn.ConvTranspose2d(5, 3, 1, bias=False), (4, 5, 6, 7), 1),
    ],
)
def test_per_channel_inputs_have_one_scale_for_each_channel(layer, shape, axis):
    torch.manual_seed(0)
    spread = torch.tensor([0.01, 1.0, 50.0, 3.0, 0.3])
    x = torch.randn(shape) * spread.view([-1 if d == axis else 1 for d in range(len(shape))])
    net = nn.Sequential(copy.deepcopy(layer)).eval()
    prepare(net, QuantPlan([Rule("*", input="int8 per_channel")]))
    calibrate(net, [x])
    rows = x.transpose(0, axis).flatten(1)
    scale = torch.maximum(rows.amax(1) / 127, rows.amin(1) / -128)
    xq = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(5, dtype=torch.int32), axis, -128, 127)
    torch.testing.assert_close(net(x), layer(xq))


@pytest.mark.parametrize("range_name", ["minmax", "percentile:99.9", "mse", "kl", "aciq", "aciq_exact", "octav", "lsq"])
def test_every_range_serves_weights_and_inputs_at_every_granularity(range_name):
    """At 8 bits each of them keeps most of the signal; the levels used are those of the grid."""
    torch.manual_seed(0)
    x = torch.relu(torch.randn(64, 16, 8, 8))
    for granularity in ("per_tensor", "per_channel", "group8"):
        layer = nn.Conv2d(16, 8, 3, bias=False)
        net = nn.Sequential(copy.deepcopy(layer)).eval()
        inputs = "per_tensor" if granularity == "group8" else granularity
        prepare(net, f"int8 {granularity} {range_name} / uint8 {inputs} {range_name}")
        calibrate(net, [x])
        with torch.no_grad():
            want, got = layer(x), net(x)
        error = 10 * torch.log10(want.square().sum() / (want - got).square().sum())
        assert error > 25, f"{granularity}: {error:.1f} dB"
        scale, _ = net[0].weight_quantizer.qparams(blocks(net[0].weight, net[0].weight_quantizer.spec.granularity))
        assert scale.numel() == {"per_tensor": 1, "per_channel": 8, "group8": 8 * 2 * 9}[granularity]


def test_complex_weights_stay_float_with_the_reason():
    net = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4))
    ledger = prepare(net, "w8a8")
    assert [(entry.name, entry.reason) for entry in ledger.left_float] == [
        ("0", "its weight is complex, levels are real numbers")
    ]
    assert type(net[0]) is nn.Linear
    with pytest.raises(PlanError, match="its weight is complex"):
        prepare(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), "w8a8")


def test_what_is_no_tensor_fails_as_in_the_float_layer():
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError) as of_float:
        net("text")
    prepare(net, "w8a8")
    with pytest.raises(TypeError) as of_ours:
        net("text")
    assert str(of_ours.value) == str(of_float.value)


def test_sparse_inputs_are_refused_with_the_remedies():
    x = torch.eye(4)
    net = nn.Sequential(nn.Linear(4, 4))
    prepare(net, "w8a8")
    with pytest.raises(QuantizationError, match=r"0\.input: the input is sparse \(torch\.sparse_coo\).*to_dense"):
        net.train()(x.to_sparse())
    net = nn.Sequential(nn.Linear(4, 4))
    prepare(net, "int8 per_channel")
    calibrate(net, [x])
    torch.testing.assert_close(net(x.to_sparse()), net(x))
