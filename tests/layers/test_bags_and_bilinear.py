"""EmbeddingBag and Bilinear against torch's functions on weights and inputs that were quantized outside."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from lq_plugin import QuantPlan, Rule, calibrate, load_checkpoint, prepare, remove
from lq_plugin.model import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from tests.layers.reference import quantized_rows, quantized_uint8


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["sum", "mean", "max"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0, 3]),
    st.integers(0, 1000),
)
def test_bags_of_quantized_rows(mode, flat, last, padding_idx, seed):
    torch.manual_seed(seed)
    bag = nn.EmbeddingBag(7, 5, mode=mode, padding_idx=padding_idx, include_last_offset=last and flat)
    nn.init.normal_(bag.weight)  # the row of the padding is 0 at first, where numpy has no scale
    prepare(nn.ModuleDict({"bag": bag}), "w4")
    index, offsets = torch.randint(0, 7, (12,)), None
    if flat:
        offsets = torch.tensor([0, 3, 3, 8, *([12] if last else [])])
    else:
        index = index.view(4, 3)
    factors = torch.rand(index.shape) if mode == "sum" else None
    weight = quantized_rows(bag.weight, 4).requires_grad_()
    options = {"mode": mode, "include_last_offset": bag.include_last_offset, "padding_idx": padding_idx}
    want = F.embedding_bag(index, weight, offsets, per_sample_weights=factors, **options)
    for training in (True, False):
        torch.testing.assert_close(bag.train(training)(index, offsets, factors), want, rtol=0, atol=0)
    (found,) = torch.autograd.grad(bag(index, offsets, factors).square().sum(), [bag.weight])
    (wanted,) = torch.autograd.grad(want.square().sum(), [weight])
    torch.testing.assert_close(found, wanted)


def test_bags_with_sparse_gradients_and_a_largest_norm():
    torch.manual_seed(0)
    index = torch.randint(0, 9, (4, 3))
    bag = nn.EmbeddingBag(9, 5, mode="sum", sparse=True)
    twin = nn.EmbeddingBag(9, 5, mode="sum", _weight=bag.weight.detach().clone())
    for module in (bag, twin):
        prepare(nn.ModuleDict({"m": module}), "w4")
        module(index).square().sum().backward()
    assert bag.weight.grad.is_sparse
    assert torch.equal(bag.weight.grad.to_dense(), twin.weight.grad)
    bag = nn.EmbeddingBag(9, 5, mode="sum", max_norm=1.0)
    plain = copy.deepcopy(bag)
    prepare(nn.ModuleDict({"m": bag}), "w8")
    bag(index), plain(index)
    assert torch.equal(bag.weight, plain.weight), "rows that were read have the norm now"


class TestBilinear:
    def net(self):
        torch.manual_seed(0)
        return nn.ModuleDict({"m": nn.Bilinear(4, 3, 5)})

    def test_it_is_the_product_of_quantized_operands(self):
        net, plan = self.net(), QuantPlan([Rule("*", weight="int4 per_channel", input="uint8 affine minmax")])
        layer, (a, b) = net["m"], (torch.randn(6, 2, 4), torch.randn(6, 2, 3))
        before = copy.deepcopy(layer)
        prepare(net, plan)
        calibrate(net, [(a, b)], lambda batch: layer(*batch))
        seen = torch.cat([a.flatten(), b.flatten()])
        weight = quantized_rows(layer.weight.flatten(1), 4).view_as(layer.weight).requires_grad_()
        want = F.bilinear(quantized_uint8(a, seen), quantized_uint8(b, seen), weight, layer.bias)
        torch.testing.assert_close(layer(a, b), want)
        (found,) = torch.autograd.grad(layer(a, b).square().sum(), [layer.weight])
        (wanted,) = torch.autograd.grad(want.square().sum(), [weight])
        torch.testing.assert_close(found, wanted)
        with float_forward(net):
            assert torch.equal(layer(a, b), before(a, b))
        remove(net)
        assert type(layer) is nn.Bilinear

    def test_ledger_and_cost(self):
        net, (a, b) = self.net(), (torch.randn(6, 4), torch.randn(6, 3))
        recording = record(net, lambda: net["m"](a, b))
        ledger = prepare(net, "w8a8")
        ledger.add_recording(recording)
        assert ledger["m"].macs == 5 * (4 + 1) * 3
        assert ledger.compute_coverage == ledger.weight_coverage == 1.0
        assert cost(net, recording).bops == 5 * (4 + 1) * 3 * 8 * 8

    def test_state_dicts_of_0_1_leave_it_float(self, tmp_path):
        net = nn.ModuleDict({"m": self.net()["m"], "bag": nn.EmbeddingBag(5, 4), "head": nn.Linear(5, 2)})
        plain = copy.deepcopy(net)
        prepare(net, "w8")
        torch.save(
            {k: v for k, v in net.state_dict().items() if "quantizer" not in k or "head" in k}, tmp_path / "old.pt"
        )
        with pytest.warns(UserWarning, match="comes from a version without ranges for m.weight, bag.weight"):
            ledger = load_checkpoint(plain, tmp_path / "old.pt", "w8")
        assert [entry.name for entry in ledger.quantized] == ["head"]
        older = "the file comes from a version without these ranges, of its weight"
        assert ledger["m"].reason == f"the plan leaves its input float; {older}"


@pytest.mark.parametrize("make", [lambda: nn.EmbeddingBag(6, 4), lambda: nn.Bilinear(4, 3, 5)])
def test_packed_files_are_bit_equal(make, tmp_path):
    from lq_plugin.export import load_packed, save_packed

    torch.manual_seed(0)
    net = nn.ModuleDict({"m": make()})
    plain = copy.deepcopy(net)
    inputs = (
        (torch.randint(0, 6, (3, 2)),)
        if isinstance(net["m"], nn.EmbeddingBag)
        else (torch.randn(6, 4), torch.randn(6, 3))
    )
    prepare(net, "w4a8")
    calibrate(net, [inputs], lambda batch: net["m"](*batch))
    save_packed(net, tmp_path / "net.safetensors")
    load_packed(plain, tmp_path / "net.safetensors")
    assert torch.equal(plain["m"](*inputs), net["m"].eval()(*inputs))


def runtime_difference(net, inputs, path):
    """The largest difference between the file, read by ONNX Runtime, and the model."""
    pytest.importorskip("onnxruntime")
    from lq_plugin.export import export_onnx, onnx_session

    export_onnx(net, inputs, path, dynamic_batch=False)
    session = onnx_session(path, threads=1)
    (got,) = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
    return (torch.from_numpy(got) - net(*inputs)).abs().max()


def test_onnx_files(tmp_path):
    """EmbeddingBag and the weight of Bilinear as the runtime computes them; what it cannot is refused by name."""
    from lq_plugin.errors import ExportError

    torch.manual_seed(0)
    index = torch.randint(0, 7, (3, 2))
    for mode in ("sum", "max"):
        bag = nn.EmbeddingBag(7, 4, mode=mode).eval()
        prepare(bag, "w4")
        calibrate(bag, [index])
        assert runtime_difference(bag, (index,), tmp_path / "bag.onnx") < 1e-6
    bag = nn.ModuleDict({"m": nn.EmbeddingBag(7, 4)})
    prepare(bag, "w4")
    calibrate(bag, [index], bag["m"])
    with pytest.raises(ExportError, match="m: ONNX Runtime 1.32 ends the process"):
        runtime_difference(bag, (index,), tmp_path / "mean.onnx")
    net, inputs = nn.Bilinear(4, 3, 5).eval(), (torch.randn(6, 4), torch.randn(6, 3))
    prepare(net, "w8")
    calibrate(net, [inputs], lambda batch: net(*batch))
    assert runtime_difference(net, inputs, tmp_path / "net.onnx") < 1e-5
    remove(net)
    prepare(net, "w8a8")
    calibrate(net, [inputs], lambda batch: net(*batch))
    with pytest.raises(ExportError, match="Bilinear has no one node that reads its input; leave that float"):
        runtime_difference(net, inputs, tmp_path / "refused.onnx")
