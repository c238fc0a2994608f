"""Keys and values of torch's attention with specs of their own, as a cache keeps them (KIVI: arXiv 2402.02750)."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lq_plugin import QAT, PlanError, QuantPlan, QuantSpec, Rule, load_checkpoint, remove
from lq_plugin.export import load_packed, save_packed
from lq_plugin.functional.error import sqnr_db
from lq_plugin.model import quantized_operations, record
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.measure.cost import cost
from lq_plugin.ptq.phases import run_phases

KEYS, VALUES = "uint4 per_channel affine minmax", "uint4 per_token affine dynamic"
CACHE = [Rule("*", weight="int8"), Rule("type:keys", input=KEYS), Rule("type:values", input=VALUES)]


class Attention(nn.Module):
    """Four heads of queries, two of keys and values, by torch's kernel."""

    def __init__(self, by_name: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.by_name = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), by_name
        with torch.no_grad():
            self.k.bias[3] = 20.0  # a channel that stands out, as keys of language models have

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        given = {"query": q, "value": v, "key": k} if self.by_name else {}
        y = F.scaled_dot_product_attention(*([] if given else [q, k, v]), **given, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


def quantized(model: nn.Module, rules: list[Rule], *batches: torch.Tensor):
    return run_phases(model.eval(), QuantPlan(rules), batches, ["calibrate"]).ledger


def rounded(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Four bits with a zero point, from `low` to `high`."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 15) - zero) * scale


def by_hand(model: Attention, x: torch.Tensor, seen: torch.Tensor) -> np.ndarray:
    """The layer in numpy: ranges of key channels from `seen`, of values from each token."""

    def heads(layer: nn.Linear, x: torch.Tensor) -> np.ndarray:
        return layer(x).detach().double().numpy().reshape(*x.shape[:2], -1, 8).transpose(0, 2, 1, 3)

    k, v, old = heads(model.k, x), heads(model.v, x), heads(model.k, seen)
    k = rounded(k, old.min((0, 2), keepdims=True), old.max((0, 2), keepdims=True))
    v = rounded(v, v.min(-1, keepdims=True), v.max(-1, keepdims=True))
    q, k, v = heads(model.q, x), k.repeat(2, axis=1), v.repeat(2, axis=1)
    scores = q @ k.swapaxes(-1, -2) / 8**0.5 + np.triu(np.full((x.shape[1],) * 2, -np.inf), 1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = p / p.sum(-1, keepdims=True) @ v
    return y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("by_name", [False, True])
def test_keys_by_channel_and_values_by_token_are_as_by_hand(by_name: bool, tmp_path) -> None:
    torch.manual_seed(0)
    model, seen, x = Attention(by_name), torch.randn(3, 6, 16), torch.randn(2, 5, 16)
    plain = Attention(by_name).eval()
    plain.load_state_dict(model.state_dict())
    ledger = quantized(model, CACHE, seen)
    assert [name for name, _ in quantized_operations(model)] == ["keys_0", "values_0"]
    assert ledger["keys_0"].plan.input == QuantSpec.parse(KEYS)
    assert ledger["values_0"].quantized
    for layer in (model.q, model.k, model.v):
        layer.weight_quantizer.enabled.fill_(False)  # of the reference also
    answer = model(x)
    np.testing.assert_allclose(answer.detach().numpy(), by_hand(plain, x, seen), rtol=1e-4, atol=1e-5)
    with float_forward(model):
        assert torch.equal(model(x), plain(x))
    # One sample: 5 tokens of 16 numbers, keys and values of 4 bits; a scale and a zero point for a token's two heads.
    recording = record(plain, lambda: plain(x), samples=2)
    assert cost(plain, recording).cache_bytes == 2 * 5 * 16 * 4
    assert cost(model, recording).cache_bytes == cost(model, recording).totals()["cache_bytes"]
    assert cost(model, recording).cache_bytes == (2 * 5 * 16 * 4 + 5 * 2 * (32 + 4)) / 8
    assert cost(plain).cache_bytes is None
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = Attention(by_name).eval()
    load_checkpoint(fresh, tmp_path / "model.pt", QuantPlan(CACHE))
    assert torch.equal(fresh(x), answer)
    save_packed(model, tmp_path / "model.safetensors", inputs=(x,))
    packed = Attention(by_name).eval()
    load_packed(packed, tmp_path / "model.safetensors")
    remove(model)
    assert torch.equal(model(x), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_keys_need_scales_of_channels_where_one_stands_out() -> None:
    """KIVI's finding: with scales of tokens a channel that stands out takes the levels of all others."""
    torch.manual_seed(0)
    plain, x = Attention().eval(), torch.randn(4, 32, 16)
    found = {}
    for keys in ("uint4 per_channel affine minmax", "uint4 per_token affine dynamic"):
        model = Attention()
        model.load_state_dict(plain.state_dict())
        quantized(model, [Rule("type:keys", input=keys)], x)
        found[keys] = float(sqnr_db(plain(x), model(x)))
    assert found["uint4 per_channel affine minmax"] > found["uint4 per_token affine dynamic"] + 3


def test_next_to_rules_of_the_whole_kernel() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    rules = [Rule("*", weight="int8", input="int8"), Rule("type:product", input="int8")]
    both, one = Attention(), Attention()
    quantized(one, rules, x)
    ledger = quantized(both, [*rules, Rule("*keys_0", input="int4 per_channel"), Rule("type:values", input="int2")], x)
    held = {name: operation.operation.operands for name, operation in quantized_operations(both)}
    assert held == {
        "scaled_dot_product_attention_0": (0,), "probabilities_0": (0,), "keys_0": (0,), "values_0": (0,)
    }  # fmt: skip
    assert ledger.compute_coverage == 1
    plain = Attention().eval()
    recording = record(plain, lambda: plain(x), samples=2)
    work = recording.sample_macs["scaled_dot_product_attention_0"]
    # The wider of both products: 8 · 4 bits of scores, 8 · 2 of sums.
    assert cost(one, recording).bops - cost(both, recording).bops == work * (8 * 8 - 8 * 4)


@pytest.mark.parametrize(("spec", "bits"), [("mxfp4", 4 + 8 / 8), ("nvfp4", 4 + 8 / 8), ("int4 group8:4", 4 + 4 / 8)])
def test_scales_of_blocks_are_kept_with_the_numbers(spec: str, bits: float) -> None:
    x, plain, model = torch.randn(2, 5, 16), Attention(), Attention()
    recording = record(plain, lambda: plain(x), samples=2)
    quantized(model, [Rule("type:keys", input=spec), Rule("type:values", input=spec)], x)
    # 5 tokens of two heads, 8 numbers each: one block. The scale of all blocks, which is calibrated, does not count.
    assert cost(model, recording).cache_bytes == 2 * 5 * 16 * bits / 8


class Trained(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(32, 16)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return F.mse_loss(self.out(self.attention(x)), x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_trained_with_moving_ranges(tmp_path) -> None:
    torch.manual_seed(0)
    module, data = Trained(), torch.utils.data.TensorDataset(torch.randn(16, 5, 16))
    rules = [
        Rule("*", weight="int8"), Rule("type:keys", input="uint4 per_channel affine ema"),
        Rule("type:values", input=VALUES),
    ]  # fmt: skip
    before = module.attention.k.weight.clone()
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, default_root_dir=tmp_path,
                        callbacks=QAT(QuantPlan(rules)))  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    keys, _ = (operation.quantizers()[0] for _, operation in quantized_operations(module))
    assert keys.scale.shape == (16,)
    assert keys.scale.std() > 0
    assert int(keys.batches) > 0
    assert not torch.equal(module.attention.k.weight, before)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fresh, x = Trained(), torch.randn(2, 5, 16)
    load_checkpoint(fresh, tmp_path / "run.ckpt")
    assert torch.equal(fresh.eval().attention(x), module.eval().attention(x))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("type:keys", input="int4 per_channel:1")], "channels are those of each head, write 'per_channel'"),
        ([Rule("type:keys", input="int4 per_channel dynamic")], "that of all sequences of a batch"),
        ([Rule("type:keys", weight="int4")], "an operation has no weight to quantize"),
        (
            [Rule("type:scaled_dot_product_attention", input="int8"), Rule("type:values", input="float")],
            "values_0 is float by a rule, and scaled_dot_product_attention_0 quantizes it",
        ),
    ],
)
def test_what_keys_and_values_cannot_have(rules: list[Rule], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        quantized(Attention(), rules, torch.randn(2, 5, 16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_language_model_that_writes_with_its_cache_computes_what_one_pass_does() -> None:
    transformers = pytest.importorskip("transformers", reason="Llama as released")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model, x = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 100, (2, 12))
    with torch.no_grad():
        expected = model(x).logits
        recording = record(model, lambda: model(x), samples=2)
        run_phases(model, QuantPlan(CACHE), [x], ["calibrate"], lambda batch: model(batch, use_cache=False))
        whole = model(x, use_cache=False).logits
        out = model(x[:, :8], use_cache=True)
        steps = [out.logits]
        for token in x[:, 8:].split(1, dim=1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert sqnr_db(expected, whole) > 15
    # Of 12 tokens in two layers with two heads of 16 numbers: 4 bits each, scale and zero point of the values' heads.
    assert cost(model, recording).cache_bytes == 12 * 2 * 2 * (2 * 16 * 4 + 32 + 4) // 8
