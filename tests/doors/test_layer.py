"""A new layer type comes in by one decorated class, and reaches plans, PTQ passes, files and reports."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, QuantSpec, Rule, calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.export.xnor.layers import spec_fault, use_xnor
from lq_plugin.layers import QuantizedLayer, register_layer
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.bias_correction import bias_correct
from lq_plugin.ptq.equalization.equalize import equalize
from lq_plugin.ptq.equalization.pairs import find_equalization_pairs
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.smooth_quant.smooth import smooth_quant
from lq_plugin.report import model_report


class Turned(nn.Module):
    """A linear layer with its weight as `[C_in, C_out]`."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Shifted(Turned):
    """A subclass that does more."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.fixture(autouse=True)
def quantized(registries_as_they_were):
    @register_layer(Turned)
    class QuantizedTurned(QuantizedLayer, Turned):
        float_class = Turned
        operation = "product"

        def channels(self):
            return tuple(self.weight.shape)

        def canonical(self, weight):
            return weight.t()

        def from_canonical(self, weight):
            return weight.t()

        def forward(self, x):
            return self.quantized_output(self.quantized_input(x) @ self.quantized_weight() + self.bias)

    @register_layer(nn.EmbeddingBag)
    class QuantizedBag(QuantizedLayer, nn.EmbeddingBag):
        float_class = nn.EmbeddingBag
        slots = ("weight", "output")

        def channels(self):
            return 0, self.embedding_dim

        def forward(self, index):
            return self.quantized_output(F.embedding_bag(index, self.quantized_weight(), mode=self.mode))


def twins():
    """Returns one function built from the new layers, and from torch's."""
    torch.manual_seed(0)
    turned = nn.Sequential(nn.LayerNorm(12), Turned(12, 10), nn.ReLU(), Turned(10, 6)).eval()
    linear = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)).eval()
    for index in (1, 3):
        linear[index].weight.data = turned[index].weight.data.t().contiguous()
        linear[index].bias.data = turned[index].bias.data.clone()
    with torch.no_grad():
        for net in (turned, linear):
            net[0].weight.copy_(torch.linspace(0.2, 3.0, 12))
    return turned, linear


def data():
    return torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def same(turned, linear):
    for index in (1, 3):
        torch.testing.assert_close(turned[index].weight.t(), linear[index].weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(turned[index].bias, linear[index].bias, rtol=1e-5, atol=1e-6)


def test_plans_calibration_cost_and_macs_take_it():
    nets = twins()
    for net in nets:
        prepare(net, "w4a8")
        calibrate(net, [data()])
    torch.testing.assert_close(nets[0](data()), nets[1](data()))
    assert (cost(nets[0])["1"].kind, cost(nets[0]).bytes) == ("Turned", cost(nets[1]).bytes)
    recordings = [record(net, lambda net=net: net(data())) for net in nets]
    assert recordings[0].macs == recordings[1].macs == {"0": 0, "1": 64 * 120, "2": 0, "3": 64 * 60}


def test_gptq_does_to_it_what_it_does_to_torchs_linear():
    nets = twins()
    for net in nets:
        prepare(net, "w3a8")
        calibrate(net, [data()])
    results = [gptq(net, [data()]) for net in nets]
    assert results[0].layers.keys() == results[1].layers.keys() == {"1", "3"}
    same(*nets)


def test_bias_correction_does_to_it_what_it_does_to_torchs_linear():
    nets = twins()
    for net in nets:
        prepare(net, "w2a8")
        calibrate(net, [data()])
        assert sorted(bias_correct(net, [data()]).layers) == ["1", "3"]
    assert nets[0][1].bias.abs().sum() > 0
    same(*nets)


def test_smoothing_does_to_it_what_it_does_to_torchs_linear():
    nets = twins()
    before = nets[0](data())
    results = [smooth_quant(net, [data()], record(net, lambda net=net: net(data()))) for net in nets]
    assert [pair.readers for pair in results[0].pairs] == [pair.readers for pair in results[1].pairs] == [("1",)]
    same(*nets)
    torch.testing.assert_close(nets[0](data()), before, rtol=1e-4, atol=1e-5)


def test_equalization_does_to_it_what_it_does_to_torchs_linear():
    nets = twins()
    before = nets[0](data())
    results = [equalize(net, record(net, lambda net=net: net(data()))) for net in nets]
    assert [(pair.producer, pair.consumer) for pair in results[0].pairs] == [("1", "3")]
    assert results[0].pairs == results[1].pairs
    assert torch.equal(results[0].factors["1"], results[1].factors["1"])
    assert not torch.allclose(results[0].factors["1"], torch.ones(10, dtype=torch.float64))
    same(*nets)
    torch.testing.assert_close(nets[0](data()), before, rtol=1e-4, atol=1e-5)


def test_a_batch_norm_is_folded_into_it_as_into_torchs_linear():
    folded = []
    for layer in (net[1] for net in twins()):
        torch.manual_seed(0)
        net = nn.Sequential(layer, nn.BatchNorm1d(10))
        net(data())  # running statistics
        net.eval()
        before = net(data())
        pairs, refused = find_batch_norm_pairs(net, record(net, lambda net=net: net(data())))
        assert ([(pair.producer, pair.batch_norm) for pair in pairs], refused) == ([("0", "1")], [])
        fold_batch_norm(net, pairs)
        torch.testing.assert_close(net(data()), before, rtol=1e-4, atol=1e-5)
        folded.append(layer)
    torch.testing.assert_close(folded[0].weight.t(), folded[1].weight, rtol=1e-6, atol=1e-7)


def test_its_bits_are_counted_as_those_of_torchs_linear():
    nets = twins()
    for net in nets:
        prepare(net, QuantPlan([Rule("1", weight="bwn", input="sign")]))
        calibrate(net, [data()])
        fake = net.eval()(data())
        assert use_xnor(net, native=False) == ["1"]
        torch.testing.assert_close(net(data()), fake, rtol=1e-5, atol=1e-5)
    assert torch.equal(nets[0][1].words, nets[1][1].words)


def test_a_subclass_with_its_own_forward_is_quantized_and_left_alone_by_the_passes():
    torch.manual_seed(0)
    net = nn.Sequential(Shifted(12, 10))
    prepare(net, "w4a8")
    calibrate(net, [data()])
    assert bool((net.eval()(data()) >= 0).all())
    assert "forward of its own" in gptq(copy.deepcopy(net), [data()]).skipped["0"]
    assert "forward of its own" in bias_correct(net, [data()]).skipped["0"]
    _, refused = find_equalization_pairs(net, record(net, lambda: net(data())))
    assert [str(layer) for layer in refused] == ["'0': Shifted has a forward of its own"]
    assert "has no kernel" in spec_fault("weight", QuantSpec.parse("bwn"), net[0])


def test_a_layer_that_declares_no_operation_is_refused_by_the_passes_in_words(tmp_path):
    torch.manual_seed(0)
    net, index = nn.Sequential(nn.EmbeddingBag(10, 8, mode="sum"), nn.Linear(8, 2)), torch.randint(10, (4, 3))
    prepare(net, "w4a8")
    calibrate(net, [index])
    assert gptq(copy.deepcopy(net), [index]).skipped == {"0": "EmbeddingBag is no product of a weight and an input"}
    assert bias_correct(copy.deepcopy(net), [index]).skipped == {"0": "EmbeddingBag has no bias"}
    assert [layer.kind for layer in model_report(net, statistics={}).model.layers] == ["EmbeddingBag", "Linear"]
    save_packed(net.eval(), tmp_path / "net.safetensors")
    other = nn.Sequential(nn.EmbeddingBag(10, 8, mode="sum"), nn.Linear(8, 2))
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other.eval()(index), net(index))
