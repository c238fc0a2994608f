"""The hidden state of LSTM, GRU and RNN, quantized: against torch where nothing rounds, and numpy where it does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lq_plugin import QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.layers import show_steps
from lq_plugin.model import quantized_layers, quantizers
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.training import commit_observers
from lq_plugin.quantizers import ActivationQuantizer
from tests.layers.recurrence_in_numpy import Sample, rounded

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
PLAN = QuantPlan([Rule("*", weight="int8 per_channel", input="uint8 affine minmax")])


def leaves(result):
    output, state = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else [state])]


def states_of(module, batch, dtype=torch.float64):
    """Random first states; `batch` is a tuple, empty where there is none."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, *batch, module.proj_size or module.hidden_size, dtype=dtype)
    c = torch.randn(count, *batch, module.hidden_size, dtype=dtype)
    return (h, c) if module.mode == "LSTM" else h


def example(module, form, length, batch, features, with_state):
    """An input in one of its forms, the first states or None, and the sequences of the samples."""
    x = torch.randn(length, batch, features, dtype=torch.float64)
    state = states_of(module, (batch,)) if with_state else None
    if form == "packed":
        lengths = torch.randint(1, length + 1, (batch,))
        lengths[torch.randint(batch, ())] = length
        given = x.transpose(0, 1) if module.batch_first else x
        given = pack_padded_sequence(given, lengths, batch_first=module.batch_first, enforce_sorted=False)
        return given, state, [x[: int(n), i] for i, n in enumerate(lengths)]
    if form == "unbatched":
        state = states_of(module, ()) if with_state else None
        return x[:, 0], state, [x[:, 0]]
    return (x.transpose(0, 1) if module.batch_first else x), state, [x[:, i] for i in range(batch)]


@st.composite
def modules(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    hidden = draw(st.integers(2, 5))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if kind == "LSTM" and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, hidden - 1))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return KINDS[kind](draw(st.integers(1, 4)), hidden, **options).double()


forms = st.sampled_from(["batch", "packed", "unbatched"])
sizes = st.tuples(st.integers(1, 5), st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(modules(), forms, sizes, st.booleans())
def test_step_by_step_is_what_torch_computes(module, form, size, with_state):
    own = copy.deepcopy(module)
    show_steps(own)
    given, state, _ = example(module, form, *size, module.input_size, with_state)
    for ours, theirs in zip(leaves(own(given, state)), leaves(module(given, state)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    found, wanted = own(given, state)[0], module(given, state)[0]
    assert type(found) is type(wanted)
    if form == "packed":
        for one, other in zip(found[1:], wanted[1:], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


@settings(max_examples=100, deadline=None)
@given(modules(), forms, sizes, st.booleans(), st.booleans())
def test_quantized_it_is_what_numpy_computes(module, form, size, with_state, everything):
    net = nn.ModuleDict({"rnn": module})
    given, state, samples = example(module, form, *size, module.input_size, with_state)
    rules = list(PLAN.rules)
    if everything:
        names = {"LSTM": "hidden|cell|gates", "GRU": "hidden|gates"}.get(module.mode, "hidden")
        rules.append(Rule(f"re:.*({names})_l.*", input="int10 minmax"))
    prepare(net, QuantPlan(rules))
    calibrate(net, [(given, state)], lambda batch: module(*batch))
    result = module.eval()(given, state)
    layers = dict(quantized_layers(net))
    weights = {name.removeprefix("rnn."): layer.quantized_weight() for name, layer in layers.items()}
    inside = {
        name.removeprefix("rnn."): rounded(layer.input_quantizer)
        for name, layer in layers.items()
        if layer.input_quantizer is not None
    }
    inside |= {q.name.split(".")[1]: rounded(q) for q in quantizers(net) if ".input_0" in q.name}
    assert any("hidden" in name for name in inside) == everything
    reference = Sample(module, weights, inside)
    first = [np.zeros_like(value.detach().numpy()) for value in leaves((None, states_of(module, (len(samples),))))[1:]]
    if state is not None:
        parts = state if isinstance(state, tuple) else (state,)
        first = [(part if form != "unbatched" else part.unsqueeze(1)).numpy() for part in parts]
    wanted = [
        reference.run(x.numpy(), first[0][:, i], first[-1][:, i] if module.mode == "LSTM" else first[0][:, i])
        for i, x in enumerate(samples)
    ]
    output, last = result[0].detach() if form != "packed" else result[0], leaves(result)[1:]
    if form == "packed":
        output = pad_packed_sequence(output, batch_first=module.batch_first)[0].detach()
    if form == "unbatched":
        output, last = output.unsqueeze(1), [value.unsqueeze(1) for value in last]
    elif module.batch_first:
        output = output.transpose(0, 1)
    for i, (y, h, c) in enumerate(wanted):
        np.testing.assert_allclose(output[: len(y), i].numpy(), y, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(last[0][:, i].detach().numpy(), h, rtol=1e-6, atol=1e-9)
        if module.mode == "LSTM":
            np.testing.assert_allclose(last[1][:, i].detach().numpy(), c, rtol=1e-6, atol=1e-9)


def gradients(result, tensors):
    """Returns the gradients of a sum that weighs every element differently."""
    total = sum((part * torch.arange(part.numel()).view_as(part).cos()).sum() for part in leaves(result))
    return torch.autograd.grad(total, tensors, allow_unused=True)


@settings(max_examples=100, deadline=None)
@given(modules(), forms, sizes, st.booleans(), st.booleans())
def test_gradients_are_those_of_torch(module, form, size, with_state, frozen):
    own = copy.deepcopy(module)
    show_steps(own)
    given, state, _ = example(module, form, *size, module.input_size, with_state)
    first = (state if isinstance(state, tuple) else (state,)) if with_state else ()
    for net in (module, own):
        net.weight_hh_l0.requires_grad_(not frozen)
    found = []
    for net in (own, module):
        inputs = [(given.data if form == "packed" else given).clone().requires_grad_()]
        inputs += [value.clone().requires_grad_() for value in first]
        x = PackedSequence(inputs[0], *given[1:]) if form == "packed" else inputs[0]
        hx = None if not first else tuple(inputs[1:]) if module.mode == "LSTM" else inputs[1]
        trained = [p for p in net.parameters() if p.requires_grad]
        found.append(gradients(net(x, hx), [*inputs, *trained]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def by_hand(module, weights, quantizers, x):
    """One layer in one direction in torch, each operation on its own: what autograd and its own operators give."""

    def through(name, value):
        if name not in quantizers:
            return value
        q = quantizers[name]
        bounds = q.spec.grid.quant_min, q.spec.grid.quant_max
        return torch.fake_quantize_per_tensor_affine(value, q.scale.item(), int(q.zero_point), *bounds)

    w_ih, w_hh = weights["weight_ih_l0"], weights["weight_hh_l0"]
    h = c = x.new_zeros(x.shape[1], module.hidden_size)
    x, outputs = through("weight_ih_l0", x), []
    for step in x:
        a, b = step @ w_ih.t() + module.bias_ih_l0, through("weight_hh_l0", h) @ w_hh.t() + module.bias_hh_l0
        if module.mode == "LSTM":
            i, f, g, o = (a + b).chunk(4, -1)
            gates = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)
            i, f, g, o = through("gates_l0", gates).chunk(4, -1)
            c = through("cell_l0", f * c + i * g)
            h = o * c.tanh()
        elif module.mode == "GRU":
            (r, z, n), (r_h, z_h, n_h) = a.chunk(3, -1), b.chunk(3, -1)
            r, z = through("gates_l0", (r + r_h).sigmoid()), through("gates_l0", (z + z_h).sigmoid())
            n = through("gates_l0", (n + r * n_h).tanh())
            h = (1 - z) * n + z * h
        else:
            h = (a + b).tanh() if module.mode == "RNN_TANH" else (a + b).relu()
        h = through("hidden_l0", h)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("inside", ["", "hidden", "cell", "gates"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_straight_through_the_roundings(kind, inside):
    """Gradients are 0 where a value lies outside of its range, which is that of a smaller batch."""
    torch.manual_seed(0)
    module = KINDS[kind](4, 5)
    if inside and inside not in {"LSTM": "hidden cell gates", "GRU": "hidden gates"}.get(kind, "hidden"):
        pytest.skip(f"{kind} has no {inside}")
    net, x = nn.ModuleDict({"rnn": module}), torch.randn(6, 3, 4)
    prepare(net, QuantPlan([*PLAN.rules, *([Rule(f"*.{inside}_l0", input="int6 minmax")] if inside else [])]))
    calibrate(net, [0.5 * x], module)
    layers = {name.removeprefix("rnn."): layer for name, layer in quantized_layers(net)}
    ranges = {name: layer.input_quantizer for name, layer in layers.items()}
    ranges |= {q.name.split(".")[1]: q for q in quantizers(net) if ".input_0" in q.name}
    found = []
    for own in (True, False):
        given = x.clone().requires_grad_()
        weights = {name: layer.quantized_weight() for name, layer in layers.items()}
        y = module.train()(given)[0] if own else by_hand(module, weights, ranges, given)
        trained = [given, *(p for name, p in module.named_parameters() if "quantizer" not in name)]
        found.append([y, *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), trained)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_ranges_of_a_state_move_with_all_steps_of_a_batch():
    torch.manual_seed(0)
    module = nn.LSTM(3, 4)
    net = nn.ModuleDict({"rnn": module})
    prepare(
        net,
        QuantPlan(
            [Rule("*", weight="int8 per_channel", input="uint8 affine ema"), Rule("*.cell_l0", input="int16 ema")]
        ),
    )
    ranges = {q.name: q for q in quantizers(net) if isinstance(q, ActivationQuantizer)}
    for quantizer in ranges.values():
        quantizer.observing = True
    x = torch.randn(6, 2, 3)
    y, (_, c) = module.train()(x)
    read = torch.cat([torch.zeros(1, 2, 4), y[:-1]])
    hidden = ranges["rnn.weight_hh_l0.input"]
    assert hidden.batch_min == read.min()
    assert hidden.batch_max == read.max()
    assert ranges["rnn.cell_l0.input_0"].batch_max >= c.max()
    commit_observers(list(ranges.values()))
    assert all(quantizer.is_calibrated for quantizer in ranges.values())
    assert not torch.equal(module(x)[0], y), "the second batch is quantized"


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "tanh"])
def test_everything_is_covered_and_8_bits_cost_little(kind):
    torch.manual_seed(0)
    module = KINDS[kind](32, 48, num_layers=2, bidirectional=True)
    net, x = nn.ModuleDict({"rnn": module, "head": nn.Linear(96, 4)}), torch.randn(20, 8, 32)
    want = module(x)[0]
    recording = record(net, lambda: net["head"](module(x)[0]))
    ledger = prepare(net, "w8a8")
    ledger.add_recording(recording)
    gates = {"LSTM": 4, "GRU": 3}.get(kind, 1)
    steps = 2 * gates * 48 * (32 + 48) + 2 * gates * 48 * (96 + 48)
    assert sum(entry.macs for entry in ledger) == 20 * 8 * (steps + 96 * 4) // 8
    assert ledger.compute_coverage == 1.0
    assert ledger.weight_coverage == 1.0
    assert cost(net, recording).bops == 20 * (steps + 96 * 4) * 8 * 8
    remove(net)
    kinds = "hidden|cell|gates" if kind == "LSTM" else "hidden|gates" if kind == "GRU" else "hidden"
    prepare(net, QuantPlan([*QuantPlan.parse("w8a8").rules, Rule(f"re:.*({kinds})_l.*", input="int16 ema")]))
    calibrate(net, [x], module)
    noise = module.eval()(x)[0] - want
    assert 10 * torch.log10(want.square().sum() / noise.square().sum()) > 30


@pytest.mark.parametrize("form", ["batch", "packed", "unbatched"])
def test_a_list_of_states_is_taken_as_torch_takes_it(form):
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 4).double()})
    given, state, _ = example(net["rnn"], form, 5, 2, 3, True)
    net["rnn"](given, list(state))
    prepare(net, "w8a8")
    calibrate(net, [given], net["rnn"])
    for ours, theirs in zip(leaves(net["rnn"](given, list(state))), leaves(net["rnn"](given, state)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "tanh"])
@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (0, 3)])
def test_a_sequence_of_no_steps_is_refused_as_torch_refuses_it(kind, shape):
    net = nn.ModuleDict({"rnn": KINDS[kind](3, 4, batch_first=shape[0] == 2)})
    message = "Expected sequence length to be larger than 0 in RNN"
    with pytest.raises(RuntimeError, match=message):
        net["rnn"](torch.randn(shape))
    prepare(net, "w8a8")
    calibrate(net, [torch.randn(2, 5, 3)], net["rnn"])
    with pytest.raises(RuntimeError, match=message):
        net["rnn"](torch.randn(shape))
