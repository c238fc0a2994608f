"""Operations inside of LSTM, GRU, RNN, their cells and attention, named by a rule: their life from plan to file."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lq_plugin import PlanError, QuantPlan, Rule, calibrate, load_checkpoint, prepare, remove
from lq_plugin.export import load_packed, save_packed
from lq_plugin.model import float_forward, quantized_operations, quantizers
from lq_plugin.model.measure.cost import cost
from lq_plugin.report.explain import explain


def attend(module, x):
    return module(x, x, x, need_weights=False)[0]


FAMILIES = {
    "LSTM": (
        lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True),
        ("hidden", "cell", "gates"),
        lambda m, x: m(x)[0],
    ),
    "GRU": (lambda: nn.GRU(8, 6), ("hidden", "gates"), lambda m, x: m(x)[0]),
    "RNN": (lambda: nn.RNN(8, 6), ("hidden",), lambda m, x: m(x)[0]),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), ("hidden", "cell", "gates"), lambda m, x: m(x[0])[0]),
    "GRUCell": (lambda: nn.GRUCell(8, 6), ("hidden", "gates"), lambda m, x: m(x[0])),
    "attention": (lambda: nn.MultiheadAttention(8, 2), ("matmul", "softmax"), attend),
}
BASE = Rule("*", weight="int8 per_channel", input="uint8 affine ema")


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def family(request):
    torch.manual_seed(0)
    make, kinds, run = FAMILIES[request.param]
    net = nn.ModuleDict({"m": make()})
    return net, kinds, lambda other, x: run(other["m"], x)


def ready(net, run, rules):
    x = torch.randn(5, 3, 8)
    prepare(net, QuantPlan(rules))
    calibrate(net, [x], lambda batch: run(net, batch))
    return x


class TestInnerOperations:
    def test_each_kind_changes_the_result_and_is_gone_when_removed(self, family):
        net, kinds, run = family
        kind = type(net["m"])
        for name in kinds:
            twin = copy.deepcopy(net)
            x = ready(twin, run, [Rule(f"type:{name}", input="int4 minmax")])
            want = run(net, x)
            found = run(twin.eval(), x)
            assert not torch.equal(found, want)
            assert {operation.op for operation in (o.operation for _, o in quantized_operations(twin))} == {name}
            with float_forward(twin):
                assert torch.equal(run(twin, x), run(net.eval(), x))
            again = pickle.loads(pickle.dumps(twin))
            assert torch.equal(run(again, x), found)
            remove(twin)
            assert type(twin["m"]) is kind
            assert torch.equal(run(twin, x), run(net, x))
            assert twin.state_dict().keys() == net.state_dict().keys()

    def test_general_rules_leave_it_float(self, family):
        net, kinds, run = family
        with pytest.raises(PlanError, match="an operation has no weight to quantize"):
            prepare(net, QuantPlan([BASE, Rule(f"type:{kinds[0]}", weight="int8")]))
        ready(net, run, [BASE])
        assert not quantized_operations(net)

    def test_checkpoints_and_packed_files_hold_it(self, family, tmp_path):
        net, kinds, run = family
        plain = copy.deepcopy(net)
        rules = [BASE, *(Rule(f"type:{name}", input="int8 ema") for name in kinds)]
        x = ready(net, run, rules)
        want = run(net.eval(), x)
        torch.save(net.state_dict(), tmp_path / "state.pt")
        other = copy.deepcopy(plain)
        ledger = load_checkpoint(other, tmp_path / "state.pt", QuantPlan(rules))
        assert torch.equal(run(other.eval(), x), want)
        names = {entry.name for entry in ledger.quantized if entry.functional}
        assert names == {name for name, _ in quantized_operations(net)}
        save_packed(net, tmp_path / "net.safetensors")
        load_packed(plain, tmp_path / "net.safetensors")
        assert torch.equal(run(plain, x), want)
        assert {q.name for q in quantizers(plain)} == {q.name for q in quantizers(net)}

    def test_it_is_explained_and_priced(self, family):
        net, kinds, run = family
        x = torch.randn(5, 3, 8)
        plan = QuantPlan([BASE, *(Rule(f"type:{name}", input="int8 ema") for name in kinds)])
        for pass_ in (None, lambda: run(net, x)):
            found = explain(plan, net, pass_)
            named = {entry.name for entry in found.ledger.quantized if entry.functional}
            assert {name.split(".")[1].partition("_")[0] for name in named} == set(kinds)
        ready(net, run, plan.rules)
        state = sum(t.numel() * t.element_size() for _, o in quantized_operations(net) for t in o.state_dict().values())
        before = cost(net).other_bytes
        assert before > state > 0

    def test_a_scale_for_each_channel_is_refused(self, family):
        net, kinds, _ = family
        with pytest.raises(PlanError, match="the operands of an operation have one each"):
            prepare(net, QuantPlan([BASE, Rule(f"type:{kinds[0]}", input="int8 per_channel")]))


def test_names_and_mistakes():
    net = nn.ModuleDict({"rnn": nn.LSTM(4, 5, num_layers=2), "cell_1": nn.Linear(5, 2)})
    with pytest.raises(PlanError, match=r"'rnn.cell_l2' matches no layer.*rnn.hidden_l0, rnn.cell_l0, rnn.gates_l0"):
        prepare(net, QuantPlan([Rule("rnn.cell_l2", input="int16")]))
    # A layer of that name is a layer.
    ledger = prepare(net, QuantPlan([Rule("cell_1", weight="int8")]))
    assert [entry.name for entry in ledger.quantized] == ["cell_1"]


def test_a_schedule_of_stages_goes_inside():
    torch.manual_seed(0)
    net, x = nn.ModuleDict({"m": nn.LSTM(4, 5)}), torch.randn(5, 3, 4)
    rules = [Rule("*.cell_l0", input="int8 minmax"), Rule("*.cell_l0", input="int3 minmax", start="epoch 1")]
    prepare(net, QuantPlan(rules))
    calibrate(net, [x], net["m"])
    (quantizer,) = next(o for _, o in quantized_operations(net)).quantizers()
    last = net["m"].eval()(x)[1][1].unique()
    quantizer.set_stage(0, 0)
    first = net["m"](x)[1][1].unique()
    assert len(last) <= 8 < len(first)
