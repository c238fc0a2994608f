"""`w8a8 products`: all products of activations, with the probabilities inside of torch's attention kernel."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import PlanError, QuantPlan, Rule, load_checkpoint, prepare, remove
from lq_plugin.errors import ExportError
from lq_plugin.export import export_onnx, load_packed, save_packed, verify
from lq_plugin.functional.error import sqnr_db
from lq_plugin.layers import attention_with
from lq_plugin.model import quantized_operations, record
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.operations.rules import needs_recording
from lq_plugin.ptq.phases import run_phases

PLAN = "w8a8 products"


class Attention(nn.Module):
    """Two heads by torch's kernel, with a mask of the keys that may be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(y.transpose(1, 2).flatten(2))


def quantized(model: nn.Module, plan: object, *inputs: torch.Tensor):
    model.eval()
    return run_phases(model, plan, [inputs], ["calibrate"], lambda batch: model(*batch)).ledger


def native(x: torch.Tensor, quantizer) -> torch.Tensor:
    """torch's own fake quantization with the range of a quantizer of unsigned bytes."""
    return torch.fake_quantize_per_tensor_affine(x, quantizer.scale.item(), int(quantizer.zero_point.item()), 0, 255)


@pytest.mark.parametrize("case", ["plain", "causal", "boolean", "added", "added and causal", "grouped", "scaled"])
def test_attention_in_steps_is_torchs_kernel(case: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8) for heads, length in ((4, 5), (2, 7), (2, 7)))
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[0, :, 2] = False  # a query that sees no key
    options = {
        "boolean": {"attn_mask": mask},
        "causal": {"is_causal": True},
        "added": {"attn_mask": torch.randn(5, 7)},
        "added and causal": {"attn_mask": torch.randn(5, 7), "is_causal": True, "scale": 0.3},
        "scaled": {"scale": 0.1},
    }.get(case, {})
    if case == "grouped":
        options = {"enable_gqa": True, "attn_mask": mask}
    else:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    results = []
    for compute in (lambda *a, **o: attention_with(lambda p: p, *a, **o), F.scaled_dot_product_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = compute(*inputs, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_mask_with_more_bits_than_the_scores() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.randn(5, 5)
    got = attention_with(lambda p: p, q, k, v, attn_mask=mask)
    assert got.dtype == torch.bfloat16
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.03)


def test_the_kernel_by_hand_switched_off_saved_and_removed(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention()), torch.randn(3, 5, 16)
    plain = copy.deepcopy(model).eval()
    ledger = quantized(model, PLAN, x)
    assert ledger.compute_coverage == 1
    assert (entry := ledger["0.scaled_dot_product_attention_0"]).reason is None
    assert entry.macs == 2 * 2 * 5 * 5 * 8
    recording = record(plain, lambda: plain(x))
    assert cost(model, recording).bops == 8 * 8 * recording.total_macs / 3
    held = {name: operation.quantizers() for name, operation in quantized_operations(model)}
    assert list(map(len, held.values())) == [3, 1]
    with torch.no_grad():
        layer = model[0]
        chunks = layer.qkv(x).chunk(3, -1)
        q, k, v = (
            native(y.unflatten(-1, (2, 8)).transpose(1, 2), quantizer)
            for y, quantizer in zip(chunks, held["0.scaled_dot_product_attention_0"], strict=True)
        )
        scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        y = native(scores.softmax(-1), held["0.probabilities_0"][0]) @ v
        answer = model(x)
        torch.testing.assert_close(answer, layer.out(y.transpose(1, 2).flatten(2)))
        assert sqnr_db(plain(x), answer) > 30
        with float_forward(model):
            assert torch.equal(model(x), plain(x))
        fresh = nn.Sequential(Attention()).eval()
        torch.save(model.state_dict(), tmp_path / "model.pt")
        load_checkpoint(fresh, tmp_path / "model.pt", PLAN)
        assert torch.equal(fresh(x), answer)
        packed = nn.Sequential(Attention()).eval()
        save_packed(model, tmp_path / "model.safetensors", inputs=(x,))
        load_packed(packed, tmp_path / "model.safetensors")
        assert torch.equal(packed(x), answer)
        remove(model)
        assert torch.equal(model(x), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
def test_onnx_refuses_the_kernel_and_takes_products_in_code(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    model = nn.Sequential(Attention())
    quantized(model, PLAN, x)
    with pytest.raises(ExportError, match="has no one node for this"):
        export_onnx(model, (x,), tmp_path / "model.onnx")
    model, x = encoder()
    quantized(model, PLAN, x)
    export_onnx(model, (x,), tmp_path / "model.onnx")
    assert verify(model, tmp_path / "model.onnx", [x]).within_one_step > 0.999


def test_rules_of_the_kernel_alone_leave_its_probabilities_float() -> None:
    """Checkpoints of such plans hold no range of probabilities, which had no name then."""
    model, x = Attention(), torch.randn(3, 5, 16)
    plan = QuantPlan([Rule("*", weight="int8"), Rule("type:scaled_dot_product_attention", input="int8 minmax")])
    ledger = quantized(model, plan, x)
    assert [name for name, _ in quantized_operations(model)] == ["scaled_dot_product_attention_0"]
    assert "what it computes inside, stays float" in str(ledger["scaled_dot_product_attention_0"].reason)


class Mixed(nn.Module):
    """A product of torch's module, which is known without a batch, and one in code, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.table = nn.MultiheadAttention(16, 2, batch_first=True), nn.Parameter(torch.randn(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return (y @ x.mT) @ x @ self.table + self.table.sum()


def test_all_products_are_known_from_a_recording_only() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 6, 16)
    with pytest.raises(PlanError, match="known from a recorded batch only"):
        prepare(model, PLAN)
    assert needs_recording(model, QuantPlan.parse(PLAN))
    ledger = quantized(model, PLAN, x)
    names = ["attention.matmul_0", "attention.matmul_1", "matmul_0", "matmul_1"]
    assert sorted(name for name, _ in quantized_operations(model)) == names
    assert not needs_recording(model, QuantPlan.parse(PLAN))
    assert prepare(model, PLAN).quantized
    # A product with a parameter that is read for something else, too, stays float, and says so.
    assert ledger["matmul_2"].reason == "functional matmul: no rule asks for it by name"


def encoder() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(8, 24, 32)


class First(nn.Module):
    """A recurrence whose state nobody asks for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


def language_model(kind: str) -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers", reason="Mixtral and Mamba 2 as released")
    own = {
        # All experts are chosen: which ones two logits near each other choose is another question.
        "Mixtral": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "num_local_experts": 4, "num_experts_per_tok": 4},
        # As wide as the weight of its convolution, which another module reads, is as small as in released models.
        "Mamba2": {"hidden_size": 256, "num_heads": 16, "head_dim": 32, "state_size": 16, "n_groups": 1},
    }[kind]  # fmt: skip
    # A second layer of Mamba 2 with random weights brings it to 27 dB, whatever its products have.
    layers = {"Mixtral": 2, "Mamba2": 1}[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=100, num_hidden_layers=layers, use_cache=False, **own)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.05)
    return model, torch.randint(0, 100, (4, 24))


TOKENS = "int8 per_token dynamic"
#: Those of the language models have a scale for each token, those of Mamba's convolution, which has its channels
#: elsewhere, one.
PLANS = {
    **dict.fromkeys(("LSTM", "GRU"), QuantPlan.parse("w8a8")),
    "Transformer": QuantPlan.parse(PLAN),
    "Mixtral": QuantPlan.parse(f"int8 per_channel / {TOKENS} products"),
    "Mamba2": QuantPlan([
        *QuantPlan.parse(f"int8 per_channel / {TOKENS} products").rules,
        Rule("type:Conv1d", input="uint8 affine"),
    ]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind",
    ["LSTM", "GRU", "Transformer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Mixtral", "Mamba2"))],
)
def test_models_of_every_kind_are_covered(kind: str) -> None:
    """At least 99 % of weights and of multiply-accumulates, and more than 30 dB at 8 bits."""
    torch.manual_seed(0)
    if kind in ("LSTM", "GRU"):
        model, x = First(getattr(nn, kind)(16, 32, num_layers=2, batch_first=True)), torch.randn(8, 10, 16)
    else:
        model, x = encoder() if kind == "Transformer" else language_model(kind)

    def run(batch: torch.Tensor) -> torch.Tensor:
        y = model(batch)
        return getattr(y, "logits", y)

    with torch.no_grad():
        expected = run(x) if model.eval() else None
        ledger = run_phases(model, PLANS[kind], [x], ["calibrate"], run).ledger
        found = run(x)
    assert ledger.weight_coverage >= 0.99
    assert (ledger.compute_coverage or 0) >= 0.99
    assert sqnr_db(expected, found) >= 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8 products", "'products' are quantized as inputs are: write 'w8a8 products'"),
        ("w8 minmax a8 pact products", "'products' have negative operands, which 'uint8 pact' cannot hold"),
        ("int8 products / float", "'products' are quantized as inputs are"),
    ],
)
def test_products_need_levels_that_fit(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        QuantPlan.parse(text)


def test_the_word_in_every_short_form() -> None:
    for text in ("w8a8 products", "products w8a8", "int8 per_channel / uint8 affine ema products"):
        plan = QuantPlan.parse(text)
        assert plan.rules == (*QuantPlan.parse("w8a8").rules, Rule("type:product", input="uint8 affine ema"))
        assert QuantPlan.from_dict(plan.to_dict()) == plan
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(PlanError, match="'type:product' matches no layer and no operation"):
        run_phases(net, PLAN, [torch.randn(2, 4)], ["calibrate"])
