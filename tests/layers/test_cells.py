"""LSTMCell, GRUCell and RNNCell: the steps of LSTM, GRU and RNN, which tests/layers/test_hidden_state.py checks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, load_checkpoint, prepare, remove
from lq_plugin.layers import show_steps
from lq_plugin.model import float_forward, quantized_layers, quantizers
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost

CELLS = {
    "LSTM": (lambda: nn.LSTMCell(3, 5), lambda: nn.LSTM(3, 5)),
    "GRU": (lambda: nn.GRUCell(3, 5), lambda: nn.GRU(3, 5)),
    "tanh": (lambda: nn.RNNCell(3, 5), lambda: nn.RNN(3, 5)),
    "relu": (lambda: nn.RNNCell(3, 5, nonlinearity="relu"), lambda: nn.RNN(3, 5, nonlinearity="relu")),
    "without bias": (lambda: nn.LSTMCell(3, 5, bias=False), lambda: nn.LSTM(3, 5, bias=False)),
}
PLAN = [
    Rule("*", weight="int8 per_channel", input="uint8 affine ema"),
    Rule("re:.*(hidden|gates)_.*", input="int8 minmax"),
]


class Loop(nn.Module):
    """A cell in a user's loop."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


@pytest.fixture(params=CELLS, ids=list(CELLS))
def pair(request):
    """A cell, and a sequence module with the same weights."""
    torch.manual_seed(0)
    cell, whole = (make() for make in CELLS[request.param])
    whole.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return cell, whole


def rules_of(module):
    gates = not isinstance(module, (nn.RNNCell, nn.RNN))
    return PLAN if gates else [PLAN[0], Rule("*.hidden_*", input="int8 minmax")]


class TestCells:
    def test_it_is_one_step_of_the_sequence(self, pair):
        x = torch.randn(6, 4, 3)
        results = []
        for module in (Loop(pair[0]), nn.ModuleDict({"rnn": pair[1]})):
            run = module if isinstance(module, Loop) else lambda batch: pair[1](batch)[0]
            prepare(module, QuantPlan(rules_of(pair[1])))
            calibrate(module, [x], run)
            trained = [p for name, p in module.named_parameters() if "quantizer" not in name]
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_float_it_is_what_torch_computes(self, pair):
        cell, own = pair[0], copy.deepcopy(pair[0])
        show_steps(own)
        state = torch.randn(2, 4, 5).unbind() if isinstance(cell, nn.LSTMCell) else torch.randn(4, 5)
        one = tuple(part[0] for part in state) if isinstance(state, tuple) else state[0]
        x = torch.randn(4, 3)
        for given in ((x,), (x, state), (x[0],), (x[0], one)):
            torch.testing.assert_close(own(*given), cell(*given))

    def test_off_and_removed_it_is_the_float_cell(self, pair):
        net, x = Loop(pair[0]), torch.randn(6, 4, 3)
        want, kind, state = net(x), type(pair[0]), net.state_dict()
        before = {key: value.clone() for key, value in state.items()}
        prepare(net, QuantPlan(rules_of(pair[0])))
        calibrate(net, [x])
        with float_forward(net):
            assert torch.equal(net(x), want)
        y = net(x)
        assert not torch.equal(y, want)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), y)
        remove(net)
        assert type(net.cell) is kind
        assert torch.equal(net(x), want)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    def test_ledger_and_cost(self, pair):
        net, x = Loop(pair[0]), torch.randn(6, 4, 3)
        recording = record(net, lambda: net(x), samples=4)
        ledger = prepare(net, "w8a8")
        ledger.add_recording(recording)
        assert [entry.name for entry in ledger.quantized] == ["cell.weight_ih", "cell.weight_hh"]
        gates = pair[0].weight_hh.shape[0]
        assert [entry.macs for entry in ledger.quantized] == [6 * gates * 3, 6 * gates * 5]
        assert ledger.compute_coverage == ledger.weight_coverage == 1.0
        assert cost(net, recording).bops == 6 * gates * (3 + 5) * 8 * 8

    def test_checkpoints_load_and_those_of_0_1_leave_cells_float(self, pair, tmp_path):
        net = nn.Sequential(Loop(pair[0]), nn.Linear(5, 2))
        plain, x = copy.deepcopy(net), torch.randn(6, 4, 3)
        prepare(net, "w8a8")
        calibrate(net, [x])
        state = net.state_dict()
        torch.save(state, tmp_path / "new.pt")
        torch.save({key: value for key, value in state.items() if "quantized_weights" not in key}, tmp_path / "old.pt")
        other = copy.deepcopy(plain)
        load_checkpoint(other, tmp_path / "new.pt", "w8a8")
        assert torch.equal(other.eval()(x), net.eval()(x))
        with pytest.warns(UserWarning, match="comes from a version without ranges for .*cell"):
            ledger = load_checkpoint(plain, tmp_path / "old.pt", "w8a8")
        assert [entry.name for entry in ledger.quantized] == ["1"]
        assert {q.name for q in quantizers(plain)} == {"1.weight", "1.input"}

    def test_what_does_not_fit_is_torchs_to_refuse(self, pair):
        net = Loop(pair[0])
        prepare(net, "w8a8")
        calibrate(net, [torch.randn(6, 4, 3)])
        bad = torch.randn(1, 5)
        with pytest.raises(RuntimeError):
            net.cell(torch.randn(4, 3), (bad, bad) if isinstance(net.cell, nn.LSTMCell) else bad)
        assert len(quantized_layers(net)) == 2

    def test_a_list_of_states_is_taken_as_torch_takes_it(self):
        net = Loop(nn.LSTMCell(3, 5))
        x, state = torch.randn(6, 4, 3), torch.randn(2, 4, 5).unbind()
        net.cell(x[0], list(state))
        prepare(net, "w8a8")
        calibrate(net, [x])
        for ours, theirs in zip(net.cell(x[0], list(state)), net.cell(x[0], state), strict=True):
            assert torch.equal(ours, theirs)

    def test_under_autocast_the_state_has_the_type_that_torch_keeps_it_in(self, pair):
        net, x = Loop(pair[0]), torch.randn(6, 4, 3)
        plain = copy.deepcopy(net)
        prepare(net, QuantPlan([Rule("*", input="int16 minmax")]))
        calibrate(net, [x])
        for learns in (True, False):
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
                torch.testing.assert_close(net(x), plain(x), rtol=0.02, atol=0.02)  # of the same type

    def test_under_autocast_a_cell_state_counts_on_after_256(self):
        net = nn.ModuleDict({"cell": nn.LSTMCell(1, 1)})
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
            net["cell"].bias_ih.fill_(20.0)  # all gates open: the cell state grows by 1 a step
        x, state = torch.ones(1, 1), None
        prepare(net, "w8a8")
        calibrate(net, [x], net["cell"])
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(300):
                state = net["cell"](x, state)
        assert state[1].item() == 300
