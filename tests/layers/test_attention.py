"""Multi-head attention against torch's own module, run on weights and inputs that were quantized outside."""

import copy
import inspect
import pickle
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, QuantPlan, Rule, calibrate, load_checkpoint, prepare, remove
from lq_plugin.model import float_forward, quantized_layers, quantizers
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.measure.fidelity import layer_fidelity
from lq_plugin.search import Evaluator
from tests.layers.reference import quantized_rows, quantized_uint8, with_quantized_weights

INPUT8 = "uint8 affine minmax"
#: What torch's kernel computes inside stays float.
FLOAT_OUTPUT = Rule("*.out_proj", input="float")
PLAN = QuantPlan([Rule("*", weight="int4 per_channel", input=INPUT8), FLOAT_OUTPUT])
MODULES = {
    "packed": lambda: nn.MultiheadAttention(8, 2),
    "batch first": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "without bias": lambda: nn.MultiheadAttention(8, 2, bias=False, batch_first=True),
    "extra keys": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True),
    "three heads": lambda: nn.MultiheadAttention(9, 3, batch_first=True),
    "separate": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True),
    "same key and value": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=6),
}
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


@pytest.fixture(params=MODULES, ids=list(MODULES))
def module(request):
    torch.manual_seed(0)
    made = MODULES[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases are 0 at first
    return made


def tensors(module, scale=1.0):
    """Query, key and value, `[4, 4, features]`: batch and length agree, so that one shape serves both orders."""
    return [scale * torch.randn(4, 4, size) for size in (module.embed_dim, module.kdim, module.vdim)]


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert (one[1] is None and other[1] is None) or torch.equal(one[1], other[1])


def weight_paths(module):
    return [name for name in module.state_dict() if name.endswith("weight")]


def prepared(module, plan=PLAN, batch=None):
    net = nn.ModuleDict({"attention": module})
    prepare(net, plan)
    if batch is not None:
        calibrate(net, [batch], lambda b: module(*b))
    return net


def calls_of(net):
    counts = {}
    for quantizer in quantizers(net):
        counts[quantizer.name] = 0
        quantizer.register_forward_hook(lambda q, *_: counts.__setitem__(q.name, counts[q.name] + 1))
    return counts


MASKS = {
    "none": {},
    "padding": {
        "key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True], [False] * 4])
    },
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(4), "is_causal": True},
    "weights of each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=list(MASKS))
def test_weights(module, options):
    reference = with_quantized_weights(module, 3, weight_paths(module))
    net = prepared(module, "w3")
    q, k, v = tensors(module)
    for mode in (True, False):
        for grad in (True, False):
            reference.requires_grad_(grad)  # torch's linear has another kernel for weights that ask for no gradient
            with torch.set_grad_enabled(grad):
                assert_same(module.train(mode)(q, k, v, **options), reference.train(mode)(q, k, v, **options))
    reference.requires_grad_(True)
    for name, layer in quantized_layers(net):
        assert torch.equal(layer.quantized_weight(), quantized_rows(layer.weight, 3)), name
    if not options:
        assert_same(module(q[0], k[0], v[0]), reference(q[0], k[0], v[0]))  # unbatched


def test_inputs_of_cross_attention(module):
    reference = with_quantized_weights(module, 4, weight_paths(module)).eval()
    seen = tensors(module)
    prepared(module, batch=seen)
    module.eval()
    q, k, v = tensors(module, 2.0)
    # One in_proj_weight has one input quantizer, three weights have three.
    ranges = seen if not module._qkv_same_embed_dim else 3 * [torch.cat([x.flatten() for x in seen])]
    want = reference(*(quantized_uint8(x, r) for x, r in zip((q, k, v), ranges, strict=True)))
    assert_same(module(q, k, v), want)
    assert_same(module(value=v, query=q, key=k), want)
    assert_same(module(q, k, value=v), want)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_quantizes_its_input_once_on_every_path(training, grad):
    """In evaluation without gradients torch takes a fused kernel, on the same quantized tensors."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    reference = with_quantized_weights(module, 4, weight_paths(module)).train(training)
    x, new = torch.randn(3, 4, 8), 2 * torch.randn(3, 4, 8)
    net = prepared(module, batch=(x, x, x))
    counts = calls_of(net)
    module.train(training)
    xq = quantized_uint8(new, x)
    with torch.set_grad_enabled(grad):
        assert_same(module(new, new, new), reference.requires_grad_(grad)(xq, xq, xq))
    assert counts == {
        "attention.in_proj_weight.weight": 1,
        "attention.in_proj_weight.input": 1,
        "attention.out_proj.weight": 1,
    }
    module(new, x, x)
    assert counts["attention.in_proj_weight.input"] == 3


def test_gradients_come_to_the_parameters(module):
    reference = with_quantized_weights(module, 8, weight_paths(module))
    prepared(module, "w8")
    batch = tensors(module)
    for net in (module, reference):
        output, scores = net(*batch)
        (output.sin().sum() + scores.square().sum()).backward()
    expected = dict(reference.named_parameters())
    assert expected.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_off_and_removed_is_the_float_module(module):
    before, batch = copy.deepcopy(module.state_dict()), tensors(module)
    attributes, inner = set(vars(module)), set(vars(module.out_proj))
    with torch.no_grad():
        want = module.eval()(*batch)
        net = prepared(module, "w2 mse a4 lsq", batch)
        assert isinstance(module, nn.MultiheadAttention)
        with float_forward(net):
            assert_same(module(*batch), want)
        assert not torch.equal(module(*batch)[0], want[0])
        added = net.state_dict().keys() - {f"attention.{name}" for name in before}
        assert len(net.state_dict()) == len(before) + len(added)
        assert all(name.startswith("attention.quantized_weights.") for name in added)
        assert set(vars(module)) == attributes
        remove(net)
        assert type(module) is nn.MultiheadAttention
        assert set(vars(module)) == attributes
        assert set(vars(module.out_proj)) == inner
        assert_same(module(*batch), want)
    assert list(module.state_dict()) == list(before)
    assert [name for name, _ in module.named_modules()] == ["", "out_proj"]


def test_copies_are_on_their_own(module):
    batch = tensors(module)
    net = prepared(module, "w4 mse a8", batch)
    net.eval()
    want = module(*batch)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same(twin["attention"](*batch), want)
        assert all(layer.owner is twin["attention"] for _, layer in quantized_layers(twin))
        with torch.no_grad():
            for parameter in twin["attention"].parameters():
                parameter.zero_()
        assert_same(module(*batch), want)
        remove(twin)
        assert type(twin["attention"]) is nn.MultiheadAttention
    fresh = nn.ModuleDict({"attention": copy.deepcopy(module)})
    remove(fresh)
    prepare(fresh, "w4 mse a8")
    fresh.load_state_dict(net.state_dict())
    assert_same(fresh["attention"].eval()(*batch), want)


def test_names_cost_and_ledger():
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)
    q, k, v = torch.randn(3, 7, 8), torch.randn(3, 11, 6), torch.randn(3, 11, 5)
    net = nn.ModuleDict({"attention": module})
    recording = record(net, lambda: module(q, k, v), samples=1)
    everything = sum(p.numel() for p in net.parameters())
    assert cost(net).float_bytes == 4 * everything
    ledger = prepare(net, PLAN)
    names = [f"attention.{key}" for key in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")]
    assert [name for name, _ in quantized_layers(net)] == names
    assert [entry.name for entry in ledger] == ["attention", *names]
    assert sum(entry.parameters for entry in ledger) == everything
    assert ledger["attention"].reason.startswith("biases stay float, and so do the scores, the probabilities")
    assert ledger["attention.out_proj"].reason == "the plan leaves its input float"
    priced = cost(net, recording)
    assert [row.macs for row in priced] == [3 * 7 * 8 * 8, 3 * 11 * 6 * 8, 3 * 11 * 5 * 8, 3 * 7 * 8 * 8]
    assert priced.other_macs == 3 * 2 * 7 * 11 * 8
    assert [row.input_bits for row in priced] == [8, 8, 8, 32]
    assert priced.other_bytes == (24 + 8) * 4
    ledger.add_recording(recording)
    assert ledger["attention.matmul_0"].macs == ledger["attention.matmul_1"].macs == 3 * 7 * 11 * 8
    read = 3 * (7 * 8 * 8 + 11 * 6 * 8 + 11 * 5 * 8)
    assert ledger.compute_coverage == read / (read + 3 * 2 * 7 * 11 * 8 + 3 * 7 * 8 * 8), (
        "scores and the input of out_proj are float"
    )
    assert ledger.weight_coverage == 1.0
    calibrate(net, [(q, k, v)], lambda batch: module(*batch))
    rows = layer_fidelity(net, lambda: module(q, k, v))
    assert [(row.layer, row.slot) for row in rows if row.slot == "input"] == [(name, "input") for name in names[:3]]
    assert all(row.sqnr_db > 10 for row in rows)


def test_preparing_again_changes_nothing(module):
    net = nn.ModuleDict({"attention": module}).eval()
    plan = "w4 lsq a4 lsq"
    ledger = prepare(net, plan)
    assert not any(part.training for part in net.modules())
    before = {name: id(part) for name, part in net.named_modules()}
    assert prepare(net, plan).rows() == ledger.rows()
    assert {name: id(part) for name, part in net.named_modules()} == before


def test_rules_choose_single_weights(module):
    reference = with_quantized_weights(module, 2, {"out_proj.weight"})
    ledger = prepare(nn.ModuleDict({"attention": module}), QuantPlan([Rule("*.out_proj", weight="int2 per_channel")]))
    assert [entry.name for entry in ledger.quantized] == ["attention.out_proj"]
    batch = tensors(module)
    assert_same(module(*batch), reference(*batch))


class Wrapped(nn.MultiheadAttention):
    def forward(self, x, mask=None):
        return super().forward(x, x, x, attn_mask=mask)


class PassedOn(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Wrapped, PassedOn])
def test_subclasses_run_their_own_forward(kind):
    torch.manual_seed(0)
    module = kind(8, 2)
    reference = with_quantized_weights(module, 4, weight_paths(module))
    x = torch.randn(4, 3, 8)
    args = (x, torch.zeros(4, 4, dtype=torch.bool)) if kind is Wrapped else (x, x, x)
    net = prepared(module, batch=args)
    net.eval()
    reference.eval()
    xq = quantized_uint8(x, x)
    assert_same(module(*args), reference(*(xq if a is x else a for a in args)))
    assert "forward" in vars(type(pickle.loads(pickle.dumps(net))["attention"]).float_class)
    assert inspect.signature(kind.forward) == inspect.signature(type(module).float_class.forward)


def encoder_layer(norm_first=False):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_encoder_layer_computes_the_formula(padding, norm_first):
    """Every product of the layer on its quantized operands, written out; in training and in evaluation."""
    layer = encoder_layer(norm_first)
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if padding else None
    reference = with_quantized_weights(layer, 4, [name for name, p in layer.named_parameters() if p.dim() == 2]).eval()
    net = nn.ModuleDict({"encoder": layer})
    prepare(net, PLAN)
    calibrate(net, [x], lambda batch: layer(batch, src_key_padding_mask=mask))
    grid = {q.name: q for q in quantizers(net)}
    counts = calls_of(net)

    def linear(name, module, y):
        scale, zero_point = grid[f"encoder.{name}.input"].qparams()
        return module(torch.fake_quantize_per_tensor_affine(y, scale.item(), int(zero_point), 0, 255))

    def attention(y):
        scale, zero_point = grid["encoder.self_attn.in_proj_weight.input"].qparams()
        yq = torch.fake_quantize_per_tensor_affine(y, scale.item(), int(zero_point), 0, 255)
        return reference.self_attn(yq, yq, yq, key_padding_mask=mask, need_weights=False)[0]

    def forward_part(y):
        return linear("linear2", reference.linear2, F.relu(linear("linear1", reference.linear1, y)))

    if norm_first:
        want = x + attention(reference.norm1(x))
        want = want + forward_part(reference.norm2(want))
    else:
        want = reference.norm1(x + attention(x))
        want = reference.norm2(want + forward_part(want))
    for mode in (True, False):
        for grad in (True, False):
            counts.update(dict.fromkeys(counts, 0))
            with torch.set_grad_enabled(grad):
                got = layer.train(mode)(x, src_key_padding_mask=mask)
            assert set(counts.values()) == {1}
            torch.testing.assert_close(got[~mask] if padding else got, want[~mask] if padding else want)


def test_encoder_and_decoder_compute_in_evaluation_what_they_do_in_training():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    batch = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    plain = copy.deepcopy(model).eval()
    prepare(model, "w4a8")
    calibrate(model, [batch], lambda b: model(*b))
    counts = calls_of(model)
    trained = model.train()(*batch)
    in_training = dict(counts)
    counts.update(dict.fromkeys(counts, 0))
    with torch.no_grad():
        evaluated = model.eval()(*batch)
        assert not torch.allclose(evaluated, plain(*batch), atol=1e-3)
    assert counts == in_training
    cross = "decoder.layers.0.multihead_attn.in_proj_weight.input"
    assert {name for name, count in counts.items() if count == 2} == {cross}, "the query, and the memory once"
    assert set(counts.values()) == {1, 2}
    torch.testing.assert_close(evaluated, trained)


class Classifier(L.LightningModule):
    """Classifier of the feature, of two, with the largest sum over a padded sequence."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 2)

    def forward(self, x, mask):
        y = self.encoder(self.embed(x), src_key_padding_mask=mask)
        return self.head(y.masked_fill(mask[..., None], 0.0).sum(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], batch[1]), batch[2])

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0], batch[1]), batch[2]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.005)


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        x = torch.randn(256, 6, 2, generator=torch.Generator().manual_seed(0))
        self.mask = torch.arange(6) >= 3 + torch.arange(256)[:, None] % 4
        self.x = x.masked_fill(self.mask[..., None], 0.0)
        self.y = self.x.sum(1).argmax(1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.mask, self.y), batch_size=32)

    val_dataloader = train_dataloader


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),  # of the float model
]


@pytest.mark.parametrize("plan", ["w4a8", "w2 lsq a4 lsq"])
def test_qat_learns_and_its_checkpoint_loads(plan, tmp_path):
    L.seed_everything(0, verbose=False)
    data, model = Data(), Classifier()
    trainer = L.Trainer(max_epochs=12, default_root_dir=tmp_path, callbacks=[QAT(plan)], **QUIET)
    trainer.fit(model, data)
    names = [name for name, _ in quantized_layers(model)]
    assert names == ["embed", *(f"encoder.layers.{i}.{n}" for i in (0, 1) for n in PARTS), "head"]
    with torch.no_grad():
        answers = model.eval()(data.x, data.mask)
    assert (answers.argmax(1) == data.y).float().mean() > 0.9
    trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    fresh = Classifier()
    load_checkpoint(fresh, tmp_path / "quantized.ckpt")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(data.x, data.mask), answers)
    if "lsq" in plan:
        moments = trainer.optimizers[0].state
        scales = [p for name, p in model.named_parameters() if "quantizer" in name]
        assert len(scales) == len(names) + 2 * len(names), "an input has a scale and a zero point"
        assert all(moments[p]["exp_avg"].abs().sum() > 0 for p in scales), "gradients reached them"


PARTS = ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]


def test_the_evaluator_scores_what_ptq_scores():
    L.seed_everything(0, verbose=False)
    model, data = Classifier(), Data()
    before = copy.deepcopy(model.state_dict())
    plans = ["w8a8", "w4a8", QuantPlan([Rule("*.in_proj_weight", weight="int2 per_channel", input="uint4 affine")])]
    space = {"weight": ["float", "int8 per_channel", "int4 per_channel", "int2 per_channel"]}
    space["input"] = ["float", "uint8 affine ema", "uint4 affine"]
    with Evaluator(
        model, data, trainer=lambda **options: L.Trainer(accelerator="cpu", **options), calibration_batches=2
    ) as evaluator:
        evaluator.calibrate(space)
        got = [evaluator.evaluate(plan) for plan in plans]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for plan, evaluation in zip(plans, got, strict=True):
        fresh = Classifier()
        fresh.load_state_dict(before)
        trainer = L.Trainer(callbacks=[PTQ(plan, calibration_batches=2)], **QUIET)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (metrics,) = trainer.validate(fresh, datamodule=data, verbose=False)
        assert evaluation.metrics["loss"] == pytest.approx(metrics["loss"], abs=0)
        assert evaluation.cost.bytes == cost(fresh).bytes
    assert len({evaluation.metrics["loss"] for evaluation in got}) == 3
