"""Weights that the code of another module multiplies itself, past their layers: quantized where they are read, once."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lq_plugin import PTQ, QAT, calibrate, load_checkpoint, prepare, remove
from lq_plugin.errors import ExportError, QuantizationError
from lq_plugin.export import export_onnx, load_packed, save_packed, verify
from lq_plugin.functional.error import sqnr_db
from lq_plugin.intent.plan import QuantPlan, Rule
from lq_plugin.layers import WeightLender
from lq_plugin.model import record
from lq_plugin.model.calibrate import float_forward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*but have no .val_dataloader"),
    pytest.mark.filterwarnings("ignore:QAT. the sanity check runs float"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]
WIDTH = 64


class BeitAttention(nn.Module):
    """Puts the bias together from three, and so calls `F.linear` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(0.1 * torch.randn(WIDTH)) for _ in range(2))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, weight=self.qkv.weight, bias=bias)
        q, k, v = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TiedAutoencoder(nn.Module):
    """Decodes with the weight of its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Linear(WIDTH, 32), nn.Linear(32, 32)

    def forward(self, x):
        return F.linear(self.middle(self.encoder(x).relu()).relu(), self.encoder.weight.t())


class MambaMixer(nn.Module):
    """The way through Mamba's block, with a convolution whose weight a function is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH)
        self.decay = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        hidden, gate = self.in_proj(x).chunk(2, -1)
        hidden = causal_convolution(hidden.mT, self.conv1d.weight.squeeze(1), self.conv1d.bias).mT
        state, states = torch.zeros_like(hidden[:, 0]), []
        for step in hidden.unbind(1):
            state = state * self.decay + step
            states.append(state)
        return self.out_proj(torch.stack(states, 1) * F.silu(gate))


def causal_convolution(x, weight, bias):
    return F.silu(F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight.unsqueeze(1), bias, groups=x.shape[1]))


#: Each with the share of weights and of MACs that are quantized, counted by hand.
CASES = {
    # Per token 3 and 1 matrices of 64 x 64; 2 x 10 x 64 in the attention kernel, which a rule of its own asks for.
    BeitAttention: ("w8a8", 1.0, 16384 / (16384 + 1280)),
    TiedAutoencoder: (
        QuantPlan([*QuantPlan.parse("w8a8").rules, Rule("*linear_0", input="uint8 affine")]), 1.0, 1.0,
    ),
    # 16 bits for what the scan's states and the gate make.
    MambaMixer: (QuantPlan([*QuantPlan.parse("w8a8").rules, Rule("*out_proj", input="int16")]), 1.0, 1.0),
}  # fmt: skip
NAMES = {BeitAttention: "qkv", TiedAutoencoder: "encoder", MambaMixer: "conv1d"}


def x_of(seed=1, size=8):
    return torch.randn(size, 10, WIDTH, generator=torch.Generator().manual_seed(seed))


def built(kind):
    torch.manual_seed(0)
    return kind().eval()


def quantized(kind, plan=None):
    net = built(kind)
    x = x_of()
    with torch.no_grad():
        recording = record(net, lambda: net(x))
        ledger = prepare(net, CASES[kind][0] if plan is None else plan, recording)
        calibrate(net, [x])
        ledger.add_recording(record(net, lambda: net(x)))
    return net, ledger


@pytest.mark.parametrize("kind", CASES)
def test_coverage_and_error(kind):
    net, ledger = quantized(kind)
    assert (ledger.weight_coverage, ledger.compute_coverage) == pytest.approx(CASES[kind][1:])
    assert ledger[NAMES[kind]].quantized
    assert ledger[NAMES[kind]].reason is None
    assert sqnr_db(built(kind)(x_of(2)), net(x_of(2))) > 30


def test_the_numbers_by_hand():
    """Both operands of the product are those of the layer's quantizers; the weight's gradient goes straight through."""
    net, _ = quantized(BeitAttention)
    x = x_of(2)
    weight = net.qkv.weight_quantizer(net.qkv.weight).detach().requires_grad_()
    bias = torch.cat([net.q_bias, torch.zeros(WIDTH), net.v_bias])
    q, k, v = F.linear(net.qkv.input_quantizer(x), weight, bias).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    expected = net.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    found = net(x)
    assert torch.equal(found, expected)
    for y in (expected, found):
        net.qkv.weight.grad = None
        y.square().sum().backward()
    assert torch.equal(net.qkv.weight.grad, weight.grad)


@pytest.mark.parametrize(
    "kind", [TiedAutoencoder, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (BeitAttention, MambaMixer))]
)
def test_off_removed_copied_and_compiled(kind, tmp_path):
    net, _ = quantized(kind)
    x, layer = x_of(2), net.get_submodule(NAMES[kind])
    before, expected, keys = built(kind)(x), net(x), set(built(kind).state_dict())
    assert {key for key in net.state_dict() if "quantizer" not in key and "quantized" not in key} == keys
    assert layer.weight is layer._parameters["weight"]
    with float_forward(net):
        assert torch.equal(net(x), before)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), expected)
        assert isinstance(other.get_submodule(NAMES[kind]), WeightLender)
        other.get_submodule(NAMES[kind]).weight.data.zero_()
        assert not torch.equal(other(x), expected)
    assert torch.equal(net(x), expected)
    # Operations that a rule names run outside of graphs.
    whole = kind is not TiedAutoencoder
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(net, backend="eager", fullgraph=whole)(x), expected, atol=1e-6)
    prepare(net, CASES[kind][0])
    assert torch.equal(net(x), expected)
    remove(net)
    assert torch.equal(net(x), before)
    assert {type(module) for module in net.modules()} == {type(module) for module in built(kind).modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("plan", [None, "w4", "int8 per_channel lsq / uint8 affine lsq"])
@pytest.mark.parametrize("kind", CASES)
def test_packed(kind, plan, tmp_path):
    net, _ = quantized(kind, plan)
    size = save_packed(net, tmp_path / "net.safetensors", inputs=(x_of(),))
    other = built(kind)
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other(x_of(2)), net(x_of(2)))
    # Held once: the quantized weights, and all else in four bytes.
    weights = sum(p.numel() for p in built(kind).parameters() if p.dim() > 1)
    assert size < weights * (0.5 if plan == "w4" else 1) + 10_000


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["w8a8", "w8"])
@pytest.mark.parametrize("kind", CASES)
def test_onnx(kind, plan, tmp_path):
    pytest.importorskip("onnxruntime")
    net, _ = quantized(kind, plan)
    export_onnx(net, (x_of(),), tmp_path / "net.onnx")
    found = verify(net, tmp_path / "net.onnx", [x_of(2)])
    assert found.within_one_step == 1
    assert found.largest_steps < 0.01


class Both(TiedAutoencoder):
    def forward(self, x):
        return F.linear(F.linear(x, self.encoder.weight).relu(), self.encoder.weight.t())


@pytest.mark.slow
def test_onnx_is_refused_where_two_tensors_meet_one_weight(tmp_path):
    pytest.importorskip("onnxruntime")
    net = built(Both)
    prepare(net, QuantPlan([Rule("encoder", weight="int8", input="uint8 affine")]))
    calibrate(net, [x_of()])
    with pytest.raises(ExportError, match="by the layer's input and by another tensor"):
        export_onnx(net, (x_of(),), tmp_path / "net.onnx")


class Trained(L.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.net = built(kind).train()

    def forward(self, x):
        return self.net(x)

    def training_step(self, x, batch_idx):
        return self(x).square().mean()

    def validation_step(self, x, batch_idx):
        self.log("val", self(x).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("kind", CASES)
def test_trained_and_calibrated_by_the_trainer(kind, tmp_path):
    data = DataLoader(x_of(size=24), batch_size=8)
    module, fresh = Trained(kind), Trained(kind)
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "default_root_dir": tmp_path, "enable_checkpointing": False}
    callback, ptq = QAT(CASES[kind][0]), PTQ(CASES[kind][0], dataloader=data)
    trainer = L.Trainer(callbacks=[callback], **settings)
    trainer.fit(module, data)
    name = f"net.{NAMES[kind]}"
    assert callback.ledger[name].quantized
    assert not torch.equal(module.get_submodule(name).weight, built(kind).get_submodule(NAMES[kind]).weight)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    load_checkpoint(fresh, tmp_path / "last.ckpt")
    assert torch.equal(fresh.eval()(x_of(2)), module.eval()(x_of(2)))
    calibrated = Trained(kind)
    L.Trainer(callbacks=[ptq], **settings).validate(calibrated, data, verbose=False)
    assert ptq.ledger[name].quantized
    assert sqnr_db(built(kind)(x_of(2)), calibrated.eval()(x_of(2))) > 30


class Writes(TiedAutoencoder):
    def forward(self, x):
        weight = self.encoder.weight
        with torch.no_grad():
            weight.clamp_(-1, 1)
        return F.linear(x, weight)


class Recomputes(TiedAutoencoder):
    def forward(self, x):
        return checkpoint(lambda x: F.linear(x, self.encoder.weight), x, use_reentrant=False)


def test_what_would_be_lost_is_refused_or_left_float():
    net = built(Writes)
    prepare(net, "w8")
    with pytest.raises(QuantizationError, match="clamp_ writes into the weight of a QuantizedLinear"):
        net(x_of())
    assert net.encoder.weight is net.encoder._parameters["weight"]  # also after an error
    # In the backward pass, where a part is computed again, nothing is lent.
    net, x = built(Recomputes), x_of()
    ledger = prepare(net, "w8")
    ledger.add_recording(record(net, lambda: net(x)))
    assert (ledger["encoder"].quantized, ledger["encoder"].reason) == (
        False,
        "never called in the recorded batch: linear_0 reads its weight, in float",
    )
