"""Quantized operations inside of attention: compared with torch where nothing rounds, with numpy where it does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lq_plugin import PlanError, QuantizationError, QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.layers import show_steps
from lq_plugin.model import float_forward, quantized_layers, quantizers
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from tests.layers.recurrence_in_numpy import rounded

INPUT = "uint8 affine minmax"
PLAN = [Rule("*", weight="int8 per_channel", input=INPUT)]
INSIDE = [
    *PLAN,
    Rule("*.matmul_0", input="int8 minmax"),
    Rule("*.matmul_1", input=INPUT),
    Rule("*.softmax_0", input="int8 minmax"),
]


@st.composite
def cases(draw):
    """A module in float64, its query, key and value, and its options."""
    heads, width = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    options = {
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        **draw(st.sampled_from([{}, {"kdim": 3, "vdim": 5}, {"kdim": 3, "vdim": 3}])),
    }
    torch.manual_seed(draw(st.integers(0, 1000)))
    module = nn.MultiheadAttention(heads * width, heads, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases are 0 at first
    length, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    alike = "kdim" not in options and draw(st.booleans())
    source = length if alike else draw(st.integers(1, 4))
    batched = draw(st.booleans())
    shape = (lambda n: (batch, n) if module.batch_first else (n, batch)) if batched else (lambda n: (n,))
    query = torch.randn(*shape(length), module.embed_dim, dtype=torch.float64)
    key = query if alike else torch.randn(*shape(source), module.kdim, dtype=torch.float64)
    value = query if alike else torch.randn(*shape(source), module.vdim, dtype=torch.float64)
    rows = batch if batched else 1
    padding = torch.rand(rows, source) < 0.3
    padding[:, 0] = False  # a query without any key is NaN
    mask = torch.rand(length, source) < 0.3
    mask[:, 0] = False
    masks = {
        "key_padding_mask": draw(
            st.sampled_from([None, padding, torch.zeros(rows, source).double().masked_fill(padding, -torch.inf)])
        ),
        "attn_mask": draw(st.sampled_from([None, mask, torch.randn(rows * heads, length, source).double()])),
    }
    if not batched and masks["key_padding_mask"] is not None:
        masks["key_padding_mask"] = masks["key_padding_mask"][0]
    # Masks of two kinds are deprecated in torch.
    if (
        masks["attn_mask"] is not None
        and masks["key_padding_mask"] is not None
        and masks["attn_mask"].dtype != masks["key_padding_mask"].dtype
    ):
        masks["attn_mask"] = None
    wanted = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    return module, (query, key, value), {**masks, **wanted}


def assert_close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], **tolerance)


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans())
def test_step_by_step_is_what_torch_computes(case, training):
    module, inputs, options = case
    own = copy.deepcopy(module)
    show_steps(own)
    assert_close(
        own.train(training)(*inputs, **options), module.train(training)(*inputs, **options), rtol=1e-6, atol=1e-9
    )


def in_numpy(module, weights, inside, inputs, key_padding_mask, attn_mask, need_weights, average_attn_weights):
    """torch's formulas of `nn.MultiheadAttention`, one sample and head at a time."""
    through = lambda name, x: inside[name](x) if name in inside else x  # noqa: E731
    w = {name: value.detach().numpy() for name, value in module.named_parameters()} | weights
    same = module._qkv_same_embed_dim
    batched = inputs[0].dim() == 3
    q, k, v = (x.numpy() if batched else x.numpy()[None] if module.batch_first else x.numpy()[:, None] for x in inputs)
    if not module.batch_first:
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    names = ["in_proj_weight"] * 3 if same else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    matrices = np.split(w["in_proj_weight"], 3) if same else [w[name] for name in names]
    biases = np.split(w["in_proj_bias"], 3) if module.in_proj_bias is not None else [0.0] * 3
    q, k, v = (through(n, x) @ m.T + b for n, x, m, b in zip(names, (q, k, v), matrices, biases, strict=True))
    outputs, found = [], []
    for sample in range(len(q)):
        keys, values, added = k[sample], v[sample], np.zeros((q.shape[1], k.shape[1]))
        masks = np.broadcast_to(added, (module.num_heads, *added.shape)).copy()
        if attn_mask is not None:
            given = attn_mask.numpy() if attn_mask.dtype != torch.bool else np.where(attn_mask.numpy(), -np.inf, 0.0)
            heads = module.num_heads
            masks += given if given.ndim == 2 else given[sample * heads : (sample + 1) * heads]
        if key_padding_mask is not None:
            padding = key_padding_mask.numpy() if batched else key_padding_mask.numpy()[None]
            masks += (np.where(padding, -np.inf, 0.0) if padding.dtype == bool else padding)[sample]
        for extra in (
            [w["bias_k"][0], w["bias_v"][0]] if module.bias_k is not None else None,
            [0 * keys[:1], 0 * values[:1]] if module.add_zero_attn else None,
        ):
            if extra is not None:
                keys, values = np.concatenate([keys, extra[0]]), np.concatenate([values, extra[1]])
                masks = np.pad(masks, ((0, 0), (0, 0), (0, 1)))
        parts, probabilities = [], []
        for head in range(module.num_heads):
            columns = slice(head * module.head_dim, (head + 1) * module.head_dim)
            scores = (
                through("matmul_0.input_0", q[sample][:, columns]) @ through("matmul_0.input_1", keys[:, columns]).T
            )
            scores = through("softmax_0.input_0", scores / np.sqrt(module.head_dim)) + masks[head]
            exponents = np.exp(scores - scores.max(-1, keepdims=True))
            probabilities.append(exponents / exponents.sum(-1, keepdims=True))
            parts.append(
                through("matmul_1.input_0", probabilities[-1]) @ through("matmul_1.input_1", values[:, columns])
            )
        bias = w["out_proj.bias"] if module.out_proj.bias is not None else 0.0
        outputs.append(through("out_proj", np.concatenate(parts, -1)) @ w["out_proj.weight"].T + bias)
        found.append(np.stack(probabilities).mean(0) if average_attn_weights else np.stack(probabilities))
    y = np.stack(outputs)
    y = y if module.batch_first else y.swapaxes(0, 1)
    return (y if batched else y.squeeze(0 if module.batch_first else 1)), np.stack(found) if batched else found[0]


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans())
def test_quantized_it_is_what_numpy_computes(case, everything):
    module, inputs, options = case
    net = nn.ModuleDict({"m": module})
    prepare(net, QuantPlan(INSIDE if everything else PLAN))
    calibrate(net, [inputs], lambda batch: module(*batch, **options))
    layers = {name.removeprefix("m."): layer for name, layer in quantized_layers(net)}
    weights = {
        "out_proj.weight" if name == "out_proj" else name: layer.quantized_weight().detach().numpy()
        for name, layer in layers.items()
    }
    inside = {n: rounded(layer.input_quantizer) for n, layer in layers.items() if layer.input_quantizer is not None}
    inside |= {q.name.removeprefix("m."): rounded(q) for q in quantizers(net) if ".input_" in q.name}
    assert len(inside) == len(weights) + 5 * everything
    found = module.eval()(*inputs, **options)
    y, probabilities = in_numpy(module, weights, inside, inputs, **options)
    np.testing.assert_allclose(found[0].detach().numpy(), y, rtol=1e-6, atol=1e-8)
    if options["need_weights"]:
        np.testing.assert_allclose(found[1].detach().numpy(), probabilities, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["causal", "padding", "both", "none"])
def test_no_path_of_torch_is_taken_past_the_quantizers(masked, need_weights):
    """In training and evaluation, with and without gradients, every quantizer sees the tensor it is for."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
    net = nn.ModuleDict({"m": module})
    prepare(net, QuantPlan(INSIDE))
    x = torch.randn(3, 5, 8)
    calibrate(net, [x], lambda batch: module(batch, batch, batch))
    options = {"need_weights": need_weights}
    if masked in ("causal", "both"):
        options |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True}
    if masked in ("padding", "both"):
        options["key_padding_mask"] = torch.zeros(3, 5).masked_fill(torch.arange(5) > 3, -torch.inf)
    counts: dict[str, int] = {}
    hooks = [
        quantizer.register_forward_hook(lambda q, *_: counts.__setitem__(q.name, counts[q.name] + 1))
        for quantizer in quantizers(net)
    ]
    for mode in (True, False):
        for grad in (True, False):
            counts.update({quantizer.name: 0 for quantizer in quantizers(net)})
            with torch.set_grad_enabled(grad):
                _, weights = module.train(mode)(x, x, x, **options)
            assert set(counts.values()) == {1}
            assert (weights is not None) == need_weights
    for hook in hooks:
        hook.remove()
    with float_forward(net):
        twin = copy.deepcopy(net)
        remove(twin)
        assert torch.equal(module(x, x, x, **options)[0], twin["m"](x, x, x, **options)[0])


def test_a_query_without_keys_gets_what_torch_gives_it():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    own = nn.ModuleDict({"m": copy.deepcopy(module)})
    prepare(own, QuantPlan([Rule("*.matmul_1", input="int16 minmax")]))
    x, padding = torch.randn(2, 3, 8), torch.tensor([[True] * 3, [False] * 3])
    calibrate(own, [x], lambda batch: own["m"](batch, batch, batch))
    ours = own["m"](x, x, x, key_padding_mask=padding, need_weights=False)[0]
    theirs = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_is_refused_with_the_reason():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    net = nn.ModuleDict({"m": module})
    with pytest.raises(PlanError, match=r"'\*.matmul_2' matches no layer"):
        prepare(net, QuantPlan([Rule("*.matmul_2", input="int8")]))
    prepare(net, QuantPlan(INSIDE))
    x = torch.randn(2, 3, 8)
    calibrate(net, [x], lambda batch: module(batch, batch, batch))
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(QuantizationError, match="nested tensors"):
        module.eval().run_inside(nested, nested, nested)
    with pytest.raises(RuntimeError, match=r"should be \(3, 3\)"):
        module(x, x, x, attn_mask=torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="attn_mask"):
        module(x, x, x, is_causal=True)


def test_ledger_and_cost_count_the_products():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    net, x = nn.ModuleDict({"m": module}), torch.randn(2, 3, 8)
    recording = record(net, lambda: module(x, x, x))
    ledger = prepare(net, QuantPlan(PLAN))
    ledger.add_recording(recording)
    projections, product = 3 * 4 * 8 * 8, 3 * 3 * 8
    assert ledger["m.out_proj"].reason is None
    assert ledger["m.matmul_0"].macs == ledger["m.matmul_1"].macs == product
    assert "functional matmul: no rule asks for it by name; 'w8a8 products'" in str(ledger["m.matmul_0"].reason)
    assert ledger.compute_coverage == projections / (projections + 2 * product)
    assert cost(net, recording).bops == projections * 8 * 8 + 2 * product * 32 * 32
    remove(net)
    ledger = prepare(net, QuantPlan([*PLAN, Rule("type:matmul", input="int8")]))
    ledger.add_recording(recording)
    assert ledger.compute_coverage == 1.0
    assert cost(net, recording).bops == (projections + 2 * product) * 8 * 8


def encoder(width, layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def test_a_transformer_is_covered():
    """Counted by hand: 12 width² of weights a token and layer, and 2 length · width of products."""
    length, width = 12, 256
    net, x = encoder(width).eval(), torch.randn(1, length, width)
    with torch.no_grad():
        recording = record(net, lambda: net(x))
    ledger = prepare(net, "w8a8")
    ledger.add_recording(recording)
    weights, products = 2 * length * 12 * width**2, 2 * length * 2 * length * width
    assert recording.total_macs == weights + products
    assert ledger.weight_coverage == 1.0
    assert ledger.compute_coverage == weights / (weights + products) > 0.99
    remove(net)
    ledger = prepare(net, QuantPlan([*QuantPlan.parse("w8a8").rules, Rule("type:matmul", input="uint8 affine ema")]))
    ledger.add_recording(recording)
    assert ledger.compute_coverage == 1.0
    assert cost(net, recording).bops == (weights + products) * 8 * 8


@pytest.mark.parametrize("inside", [False, True])
def test_8_bits_cost_little(inside):
    net, x = encoder(64).eval(), torch.randn(8, 20, 64)
    padding = torch.arange(20) > torch.randint(10, 20, (8, 1))
    with torch.no_grad():
        want = net(x, src_key_padding_mask=padding)
        rules = [Rule("type:matmul", input="uint8 affine ema"), Rule("type:softmax", input="int16 ema")]
        prepare(net, QuantPlan([*QuantPlan.parse("w8a8").rules, *(rules if inside else [])]))
        calibrate(net, [x], lambda batch: net(batch, src_key_padding_mask=padding))
        found = net(x, src_key_padding_mask=padding)
    noise = (found - want)[~padding]
    assert 10 * torch.log10(want[~padding].square().sum() / noise.square().sum()) > 30
