"""LSTM, GRU and RNN against torch's own modules, run on weights and inputs that were quantized outside."""

import copy
import pickle
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, PlanError, QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.model import float_forward, quantized_layers, quantizers
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.fidelity import layer_fidelity
from lq_plugin.search import Evaluator
from tests.layers.reference import quantized_rows, quantized_uint8, with_quantized_weights

MODULES = {
    "LSTM": lambda: nn.LSTM(5, 6),
    "LSTM stacked": lambda: nn.LSTM(5, 6, num_layers=3, batch_first=True),
    "LSTM bidirectional": lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True),
    "LSTM projected": lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=4),
    "LSTM without bias": lambda: nn.LSTM(5, 6, bias=False),
    "GRU": lambda: nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True),
    "RNN tanh": lambda: nn.RNN(5, 6, num_layers=2),
    "RNN relu": lambda: nn.RNN(5, 6, nonlinearity="relu", bidirectional=True),
}
INPUT8 = "uint8 affine minmax"
#: What torch's kernel computes inside stays float.
FLOAT_STATE = Rule(r"re:.*weight_(hh|hr|ih_l[1-9]).*", input="float")
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(params=MODULES, ids=list(MODULES))
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]()


def leaves(result):
    output, state = result
    output = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else [state])]


def assert_same(one, other):
    for x, y in zip(leaves(one), leaves(other), strict=True):
        assert torch.equal(x, y)


def calls_of(net):
    counts = {}
    for quantizer in quantizers(net):
        counts[quantizer.name] = 0
        quantizer.register_forward_hook(lambda q, *_: counts.__setitem__(q.name, counts[q.name] + 1))
    return counts


@pytest.mark.parametrize("bits", [2, 4])
def test_weights(module, bits):
    reference = with_quantized_weights(module, bits)
    net = nn.ModuleDict({"rnn": module})
    prepare(net, f"w{bits}")
    x = torch.randn(4, 3, 5)
    for mode in (True, False):
        assert_same(module.train(mode)(x), reference.train(mode)(x))
    assert_same(module(x[0]), reference(x[0]))  # unbatched
    reference.requires_grad_(False)  # torch's GRU has another kernel for weights that ask for no gradient
    with torch.no_grad():
        assert_same(module(x), reference(x))
    for name, layer in quantized_layers(net):
        assert torch.equal(layer.quantized_weight(), quantized_rows(layer.weight, bits)), name


def test_weights_inputs_and_initial_states(module):
    reference = with_quantized_weights(module, 4)
    net = nn.ModuleDict({"rnn": module})
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel", input=INPUT8), FLOAT_STATE]))
    x = torch.randn(4, 4, 5)
    calibrate(net, [x], module)
    new = 2 * torch.randn(4, 4, 5)
    directions = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(directions, 4, module.proj_size or 6)
    state = (h, torch.randn(directions, 4, 6)) if isinstance(module, nn.LSTM) else h
    want = reference.eval()(quantized_uint8(new, x), state)
    assert_same(module.eval()(new, state), want)
    assert_same(module(hx=state, input=new), want)
    assert not torch.equal(want[0], reference(new, state)[0])


def test_packed_sequences(module):
    reference = with_quantized_weights(module, 4)
    net = nn.ModuleDict({"rnn": module})
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel", input=INPUT8), FLOAT_STATE]))
    x = torch.randn(4, 4, 5)
    lengths = torch.tensor([2, 4, 1, 3])

    def packed(data):
        return pack_padded_sequence(data, lengths, batch_first=module.batch_first, enforce_sorted=False)

    calibrate(net, [packed(x)], module)
    got, want = module.eval()(packed(x)), reference.eval()(packed(quantized_uint8(x, packed(x).data)))
    assert_same(got, want)
    for one, other in zip(pad_packed_sequence(got[0]), pad_packed_sequence(want[0]), strict=True):
        assert torch.equal(one, other)


def test_gradients_come_to_the_parameters(module):
    """With the straight-through estimator, nothing clipped: the gradients of the float module on the quantized
    weights."""
    reference = with_quantized_weights(module, 8)
    net = nn.ModuleDict({"rnn": module})
    prepare(net, "w8")
    x, y = torch.randn(4, 3, 5, requires_grad=True), torch.randn(1)
    for net_, inputs in ((module, x), (reference, x.detach().clone().requires_grad_())):
        sum((part * y).sin().sum() for part in leaves(net_(inputs))).backward()
    expected = dict(reference.named_parameters())
    assert expected.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
    assert x.grad is not None


def test_every_quantizer_runs_in_training_and_in_evaluation(module):
    """Those of weights and sequences once, those of the state at each of three or four steps."""
    net = nn.ModuleDict({"rnn": module})
    prepare(net, "w4a8")
    x = torch.randn(4, 3, 5)
    calibrate(net, [x], module)
    counts = calls_of(net)
    for mode in (True, False):
        for grad in (True, False):
            counts.update(dict.fromkeys(counts, 0))
            with torch.set_grad_enabled(grad):
                module.train(mode)(x)
            for name, count in counts.items():
                in_steps = name.endswith(".input") and ("_hh_" in name or "_hr_" in name)
                assert count == (x.shape[module.batch_first] if in_steps else 1), name
    weights = [name for name in module.state_dict() if name.startswith("weight_")]
    read = {f"rnn.{name}.input" for name in weights if not (name.startswith("weight_ih") and "reverse" in name)}
    assert set(counts) == {f"rnn.{name}.weight" for name in weights} | read


def test_off_and_removed_is_the_float_module(module):
    before, kind, x = copy.deepcopy(module.state_dict()), type(module), torch.randn(4, 3, 5)
    attributes, parameters = set(vars(module)), dict(module.named_parameters())
    want = module.eval()(x)
    net = nn.ModuleDict({"rnn": module})
    prepare(net, "w2 mse a4 lsq")
    assert isinstance(module, kind)
    assert type(module).__name__ == f"Quantized{kind.__name__}"
    calibrate(net, [x], module)
    with float_forward(net):
        assert_same(module(x), want)
    assert not torch.equal(module(x)[0], want[0])
    state = net.state_dict()
    assert {f"rnn.{name}" for name in before} <= state.keys()
    assert all("quantized_weights" in name for name in state.keys() - {f"rnn.{name}" for name in before})
    remove(net)
    assert type(module) is kind
    assert set(vars(module)) == attributes
    assert {name: id(p) for name, p in module.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert_same(module(x), want)
    assert list(module.state_dict()) == list(before)
    assert list(module.children()) == []


def test_copies_are_on_their_own(module):
    x = torch.randn(4, 3, 5)
    net = nn.ModuleDict({"rnn": module})
    prepare(net, "w4 mse a8")
    calibrate(net, [x], module)
    want = module.eval()(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same(twin["rnn"](x), want)
        for (_, layer), (_, original) in zip(quantized_layers(twin), quantized_layers(net), strict=True):
            assert layer.owner is twin["rnn"]
            assert layer.weight is not original.weight
        with torch.no_grad():
            for parameter in twin["rnn"].parameters():
                parameter.zero_()
        assert_same(module(x), want)
        remove(twin)
        assert type(twin["rnn"]) is type(module).float_class
    fresh = nn.ModuleDict({"rnn": copy.deepcopy(module)})
    remove(fresh)
    prepare(fresh, "w4 mse a8")
    fresh.load_state_dict(net.state_dict())
    assert_same(fresh["rnn"].eval()(x), want)


def test_float_checkpoints_load_and_ranges_are_found_anew(module):
    kind = copy.deepcopy(module)
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    net = nn.ModuleDict({"rnn": module})
    prepare(net, "w4 mse")
    calibrate(net, [torch.randn(4, 3, 5)], module)
    module.load_state_dict(state)
    assert all(not q.is_calibrated for q in quantizers(net))
    with pytest.raises(RuntimeError, match="quantized_weights"):
        kind.load_state_dict(module.state_dict())
    remove(net)
    kind.load_state_dict(module.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in kind.state_dict().items())


def test_functional_call_and_moves(module):
    net = nn.ModuleDict({"rnn": module})
    prepare(net, "w4")
    x = torch.randn(4, 3, 5)
    other = {name: torch.randn_like(parameter) for name, parameter in module.named_parameters()}
    plain = copy.deepcopy(module)
    remove(plain)
    plain.load_state_dict(other)
    want = with_quantized_weights(plain, 4).requires_grad_(False)(x)
    assert_same(torch.func.functional_call(module, other, (x,)), want)
    assert module.double()(x.double())[0].dtype == torch.float64


def test_rules_choose_single_weights():
    torch.manual_seed(0)
    module = nn.LSTM(5, 6, num_layers=2)
    reference = with_quantized_weights(module, 3, {"weight_hh_l0", "weight_hh_l1"})
    net = nn.ModuleDict({"rnn": module, "head": nn.Linear(6, 2)})
    ledger = prepare(net, QuantPlan([Rule("*.weight_hh_*", weight="int3 per_channel")]))
    assert [entry.name for entry in ledger.quantized] == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    x = torch.randn(4, 3, 5)
    assert_same(module(x), reference(x))
    assert [name for name, _ in quantized_layers(net)] == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    assert ledger["rnn"].reason.startswith("biases stay float, and so do the gates and the stored state")
    assert ledger["rnn"].parameters == 4 * 4 * 6
    assert ledger["rnn.weight_hh_l0"].reason == "the plan leaves its input float"
    assert prepare(net, QuantPlan([Rule("*.weight_hh_*", weight="int3 per_channel")])).same_layers(ledger)
    with pytest.raises(PlanError, match="another plan"):
        prepare(net, "w4")
    remove(net)
    prepare(net, QuantPlan([Rule("type:LSTM", weight="int4"), Rule("type:Linear", weight="int8")]))
    assert len(quantized_layers(net)) == 5
    remove(net)
    with pytest.raises(
        PlanError, match=r"'rnn' matches no layer that can be quantized, only rnn \(LSTM\)\. Did you mean 'rnn\.\*'"
    ):
        prepare(net, QuantPlan([Rule("rnn", weight="int4")]))
    with pytest.raises(PlanError, match="xnor"):
        prepare(net, QuantPlan([Rule("rnn.*", input="xnor")]))


def test_a_bare_module_is_a_model_too():
    module = nn.GRU(5, 6)
    reference = with_quantized_weights(module, 4)
    ledger = prepare(module, "w4")
    assert [entry.name for entry in ledger] == ["", "weight_ih_l0", "weight_hh_l0"]
    x = torch.randn(4, 3, 5)
    assert_same(module(x), reference(x))
    remove(module)
    assert type(module) is nn.GRU


class Doubling(nn.LSTM):
    """A forward of its own, with another signature."""

    def forward(self, sequence, lengths=None):
        return super().forward(2 * sequence)


class ByHand(nn.RNN):
    """Reads its parameters itself."""

    def forward(self, input):
        for key, part in getattr(self, "quantized_weights", {}).items():
            assert part.weight is self._parameters[key], "a part always sees the parameter"
        h, outputs = input.new_zeros(input.shape[1], self.hidden_size), []
        for x in input:
            h = torch.tanh(x @ self.weight_ih_l0.t() + self.bias_ih_l0 + h @ self.weight_hh_l0.t() + self.bias_hh_l0)
            outputs.append(h)
        return torch.stack(outputs), h


@pytest.mark.parametrize("kind", [Doubling, ByHand])
def test_subclasses_run_their_own_forward(kind):
    module = kind(5, 6)
    reference = with_quantized_weights(module, 4)
    net = nn.ModuleDict({"rnn": module})
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel", input=INPUT8)]))
    x = torch.randn(4, 3, 5)
    calibrate(net, [x], module)
    net.eval()
    assert_same(module(x), reference(quantized_uint8(x, x)))
    assert type(pickle.loads(pickle.dumps(net))["rnn"]).__name__ == f"Quantized{kind.__name__}"


def test_what_is_no_plain_parameter_stays_float():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.LSTM(5, 6), "weight_hh_l0")
    new = nn.utils.parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0")
    net = nn.ModuleDict({"old": old, "new": new, "head": nn.Linear(6, 2)})
    ledger = prepare(net, "w4")
    assert [entry.name for entry in ledger.quantized] == ["head"]
    for name in ("old", "new"):
        assert ledger[name].reason.startswith("its weight_hh_l0 is no plain parameter")
    recording = record(net, lambda: (old(torch.randn(4, 3, 5)), new(torch.randn(4, 3, 5))))
    assert recording.samples == 3, "of sequences [L, N, C]"
    ledger.add_recording(recording)
    assert ledger["old"].macs == ledger["new"].macs == 4 * 24 * (5 + 6)


def test_inputs_must_be_seen():
    net = nn.ModuleDict({"rnn": nn.LSTM(5, 6)})
    prepare(net, "w4a8")
    with pytest.raises(TypeError, match=r"rnn\.weight_ih_l0\.input: call the module with input"):
        net["rnn"](x=torch.randn(4, 3, 5))
    assert not {"weight_ih_l0", "weight_hh_l0"} & set(vars(net["rnn"]))


def test_cost_and_ledger_count_each_weight_once():
    module = nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=4)
    net = nn.ModuleDict({"rnn": module, "tied": nn.LSTM(5, 6)})
    net["tied"].weight_hh_l0 = net["tied"].weight_hh_l0
    x = torch.randn(4, 3, 5)
    recording = record(net, lambda: module(x))
    everything = sum(p.numel() for p in net.parameters())
    free = cost(net, recording)
    assert free.float_bytes == free.bytes == 4 * everything
    ledger = prepare(net, QuantPlan([Rule("*", weight="int4 per_channel", input=INPUT8)]))
    priced = cost(net, recording)
    assert priced.float_bytes == 4 * everything
    assert priced.macs == recording.total_macs // 3 == free.macs
    assert sum(row.macs for row in priced) == recording.total_macs // 3, "all of it is the weights' work"
    assert all(row.input_bits == 8 for row in priced if row.name.startswith("rnn"))
    row = priced["rnn.weight_hh_l0"]
    assert (row.elements, row.storage_bits, row.kind) == (24 * 4, 24 * 4 * 4 + 24 * 32, "LSTM")
    assert sum(entry.parameters for entry in ledger) == everything
    ledger.add_recording(recording)
    assert ledger.weight_coverage == 1.0
    assert ledger.compute_coverage == 1.0
    # Of 4 gates x 6 units that read 5 inputs in both directions, all that is left multiplies states.
    float_state = QuantPlan([Rule("*", weight="int4 per_channel", input=INPUT8), FLOAT_STATE])
    remove(net)
    ledger = prepare(net, float_state)
    ledger.add_recording(recording)
    one_step = 2 * (24 * (5 + 4) + 6 * 4 + 24 * (8 + 4) + 6 * 4)
    assert ledger.compute_coverage == 2 * 24 * 5 / one_step
    assert [row.input_bits for row in cost(net, recording)][:6] == [8, 32, 32, 8, 32, 32], (
        "both directions read one quantized sequence"
    )
    assert ledger["rnn.weight_hr_l1"].calls == 1
    assert ledger["tied.weight_hh_l0"].reason == "never called in the recorded batch"
    calibrate(net, [x], lambda batch: (module(batch), net["tied"](batch)))
    rows = layer_fidelity(net, lambda: module(x))
    assert {row.layer for row in rows} == {row.name for row in priced}
    assert all(row.sqnr_db > 10 for row in rows if row.slot == "weight")


def test_shared_weights_are_stored_once():
    one, two = nn.LSTM(5, 6), nn.LSTM(5, 6)
    for name in list(dict(one.named_parameters())):
        setattr(two, name, getattr(one, name))
    net = nn.ModuleDict({"one": one, "two": two})
    prepare(net, "w4")
    assert [row.tied_to for row in cost(net)] == [None, None, "one.weight_ih_l0", "one.weight_hh_l0"]
    assert torch.equal(one(torch.ones(2, 1, 5))[0], two(torch.ones(2, 1, 5))[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_it(module, reentrant):
    net, x = nn.ModuleDict({"rnn": module}), torch.randn(4, 3, 5)
    prepare(net, "w8a8")
    calibrate(net, [x], module)
    found = []
    for run in (module.train(), lambda given: checkpoint(module, given, use_reentrant=reentrant)):
        given = x.clone().requires_grad_()
        leaves(run(given))[0].square().sum().backward()
        found.append([given.grad, *(p.grad.clone() for p in module.parameters())])
        module.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Sequences(L.LightningModule):
    """Tells which of two sums of a sequence is larger."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam([self.rnn.weight_hh_l0, self.rnn.weight_ih_l0, *self.head.parameters()], lr=0.02)


EMA = [
    Rule("*.cell_l*", input="int16 ema"),
    Rule("*.gates_l*", input="int8 ema"),
    Rule("*.hidden_l*", input="int8 ema"),
]
LSQ = [Rule("*.cell_l*", input="int8 lsq"), Rule("*.gates_l*", input="int6 lsq"), Rule("*.hidden_l*", input="int6 lsq")]


class Scored(Sequences):
    """Validates by its loss."""

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_a_search_scores_what_ptq_scores(tmp_path):
    L.seed_everything(0, verbose=False)
    x = torch.randn(64, 6, 2)
    loader = DataLoader(TensorDataset(x, x.sum(1).argmax(1)), batch_size=32)
    data, model = L.LightningDataModule.from_datasets(val_dataset=loader.dataset, batch_size=32), Scored()
    before = copy.deepcopy(model.state_dict())
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plans = ["w8a8", "w4a8", QuantPlan([*QuantPlan.parse("w8a8").rules, FLOAT_STATE])]
    space = {"weight": ["float", "int8 per_channel", "int4 per_channel"], "input": ["float", "uint8 affine ema"]}
    options = {"calibration_batches": 2, "dataloader": loader}
    with Evaluator(model, data, trainer=lambda **given: L.Trainer(accelerator="cpu", **given), **options) as evaluator:
        evaluator.calibrate(space)
        found = [evaluator.evaluate(plan) for plan in plans]
    for plan, evaluation in zip(plans, found, strict=True):
        fresh = Scored()
        fresh.load_state_dict(before)
        trainer = L.Trainer(callbacks=[PTQ(plan, **options)], default_root_dir=tmp_path, **quiet)
        (metrics,) = trainer.validate(fresh, datamodule=data, verbose=False)
        assert evaluation.metrics["loss"] == pytest.approx(metrics["loss"], abs=0)
        assert evaluation.cost.bytes == cost(fresh).bytes
    assert len({evaluation.metrics["loss"] for evaluation in found}) == 3


@pytest.mark.parametrize(
    "plan",
    [
        "w4a8",
        "w2 lsq a4 lsq",
        "int4 per_channel mse / mxint8",
        QuantPlan([*QuantPlan.parse("w4a8").rules, *EMA]),
        QuantPlan([*QuantPlan.parse("w4a8").rules, *LSQ]),
    ],
    ids=["w4a8", "lsq", "mxint8", "ema inside", "lsq inside"],
)
def test_qat_learns(plan, tmp_path):
    L.seed_everything(0, verbose=False)
    x = torch.randn(256, 6, 2)
    loader = DataLoader(TensorDataset(x, x.sum(1).argmax(1)), batch_size=32)
    model = Sequences()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(max_epochs=10, accelerator="cpu", default_root_dir=tmp_path, callbacks=[QAT(plan)], **quiet)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(model, loader)
    assert len(quantized_layers(model)) == 5
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == x.sum(1).argmax(1)).float().mean() > 0.85
    moments = trainer.optimizers[0].state
    learned = [p for name, p in model.named_parameters() if "quantizer" in name]
    assert (len(learned) > 0) == ("lsq" in str(plan))
    assert all(moments[p]["exp_avg"].abs().sum() > 0 for p in learned), "gradients reached them"
