"""The hidden state of LSTM, GRU and RNN, quantized: against torch where nothing rounds, and numpy where it does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.layers import show_steps
from lq_plugin.model import quantized_layers, quantizers
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
