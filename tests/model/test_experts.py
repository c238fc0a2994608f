"""Mixtures of experts of transformers: their 3-D parameters as layers, in each of the ways to compute them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lq_plugin
from lq_plugin import QuantPlan, Rule
from lq_plugin.export import load_packed, save_packed
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import cost

transformers = pytest.importorskip("transformers", reason="mixtures of experts as released models have them")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WAYS = ("grouped_mm", "batched_mm", "eager")
SMALL = {
    "vocab_size": 100, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "use_cache": False,
}  # fmt: skip
IDS = torch.randint(0, 100, (2, 6), generator=torch.Generator().manual_seed(0))


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SMALL, intermediate_size=192, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen() -> Any:
    sizes = {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 96, "intermediate_size": 128}
    config = transformers.Qwen2MoeConfig(**SMALL, **sizes, num_experts=6, num_experts_per_tok=2)
    return transformers.Qwen2MoeForCausalLM(config)


def gpt_oss() -> Any:
    """Its weights are kept as `[experts, in, out]`, with biases."""
    sizes = {"head_dim": 32, "sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}
    config = transformers.GptOssConfig(
        **SMALL, **sizes, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}


def built(name: str, way: str = "grouped_mm") -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if "experts" in parameter_name and "bias" not in parameter_name:
            nn.init.normal_(parameter, std=0.05)
    model.set_experts_implementation(way)
    return model


def run(model: Any) -> Any:
    return lambda ids=IDS: model(input_ids=ids).logits


def calibrated(model: Any, plan: Any) -> Any:
    lq_plugin.prepare(model, plan)
    lq_plugin.calibrate(model, [IDS], run=run(model))
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_covered_by_the_default_rules_and_bit_equal_when_off(name: str, way: str) -> None:
    model = built(name, way)
    with torch.no_grad():
        expected = run(model)()
        ledger = lq_plugin.prepare(model, "w8a8")
        with float_forward(model):
            assert torch.equal(run(model)(), expected)
            ledger.add_recording(record(model, run(model)))
    attention = sum(
        entry.macs or 0 for entry in ledger if entry.kind == "scaled_dot_product_attention" or "matmul" in entry.kind
    )
    total = sum(entry.macs or 0 for entry in ledger)
    # Scores and products of an attention are operations, which are quantized where a rule names them.
    assert ledger.compute_coverage is not None
    assert ledger.compute_coverage * total + attention >= 0.999 * total
    assert ledger.weight_coverage >= 0.99
    config = model.config
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    routed = IDS.shape[1] * config.num_experts_per_tok * config.hidden_size * width
    assert ledger["model.layers.0.mlp.experts.gate_up_proj"].macs == 2 * routed
    assert ledger["model.layers.1.mlp.experts.down_proj"].macs == routed
    lq_plugin.remove(model)
    with torch.no_grad():
        assert torch.equal(run(model)(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_ways_to_compute_agree(name: str) -> None:
    outputs = []
    for way in WAYS:
        model = calibrated(built(name, way), "int8 per_channel / int8 minmax")
        with torch.no_grad():
            outputs.append(run(model)())
    for output in outputs[1:]:
        assert (output - outputs[0]).abs().max() < 1e-2 * outputs[0].abs().max()


def test_eight_bits_are_near_float() -> None:
    """The router chooses among experts whose probabilities are near each other: here it has chosen."""
    x, index, shares = torch.randn(20, 128), torch.randint(0, 4, (20, 2)), torch.rand(20, 2)
    experts = built("mixtral").model.layers[0].mlp.experts
    with torch.no_grad():
        expected = experts(x, index, shares)
        lq_plugin.prepare(experts, "w8a8")
        lq_plugin.calibrate(experts, [x], run=lambda batch: experts(batch, index, shares))
        found = experts(x, index, shares)
    error = (found - expected).pow(2).sum()
    assert 10 * torch.log10(expected.pow(2).sum() / error) >= 30


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_against_a_dense_loop(name: str) -> None:
    """One layer of experts against a loop over them, on weights and inputs that are rounded by hand."""
    model = calibrated(built(name), "int4 per_channel / float")
    experts = model.model.layers[0].mlp.experts
    transposed = name == "gpt_oss"
    x = torch.randn(5, model.config.hidden_size)
    index = torch.tensor([[0, 1], [1, 3], [0, 3], [3, 1], [1, 0]])  # expert 2 has no tokens
    shares = torch.rand(5, 2)

    def rounded(stack: torch.Tensor) -> torch.Tensor:
        w = (stack.mT if transposed else stack).double()
        scale = torch.maximum(w.amax(-1, keepdim=True) / 7, -w.amin(-1, keepdim=True) / 8)
        return (w / scale).round().clamp(-8, 7) * scale

    up, down = (rounded(stack.detach()) for stack in (experts.gate_up_proj, experts.down_proj))
    expected = torch.zeros_like(x).double()
    for token, (row, share) in enumerate(zip(index, shares, strict=True)):
        for expert, weight in zip(row.tolist(), share, strict=True):
            y = F.linear(x[token].double(), up[expert])
            if transposed:
                y = experts._apply_gate((y + experts.gate_up_proj_bias[expert])[None])[0]
            else:
                y = F.silu(y.chunk(2)[0]) * y.chunk(2)[1]
            y = F.linear(y, down[expert])
            expected[token] += weight * (y + experts.down_proj_bias[expert] if transposed else y)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, index, shares).double(), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "plan",
    ["w4a8", "int4 per_tensor / int8 lsq", "mxfp4 / mxfp8_e4m3", "twn / uint8 affine", "int4 lsq group32 / int8 lsq"],
)
def test_trained_packed_and_resumed(plan: str, tmp_path: Any) -> None:
    model = calibrated(built("mixtral"), plan)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.model.layers[0].mlp.experts.down_proj)
    model.eval()
    with torch.no_grad():
        expected = run(model)()
        save_packed(model, tmp_path / "model.safetensors")
        packed = built("mixtral")
        load_packed(packed, tmp_path / "model.safetensors")
        assert torch.equal(run(packed)(), expected)
        again = built("mixtral")
        lq_plugin.prepare(again, plan)
        again.load_state_dict(model.state_dict())
        assert torch.equal(run(again)(), expected)


def test_a_packed_mixture_is_as_small_as_its_bits(tmp_path: Any) -> None:
    model = calibrated(
        built("mixtral"), QuantPlan([Rule("*", weight="int8"), Rule("*.experts.*", weight="int4 group32")])
    )
    rows = {row.name: row for row in cost(model).rows}
    row = rows["model.layers.0.mlp.experts.gate_up_proj"]
    elements = 4 * 2 * 192 * 128
    assert row.elements == elements
    assert row.storage_bits == elements * 4 + elements // 32 * 32
    size = save_packed(model, tmp_path / "model.safetensors")
    assert size < 0.3 * sum(p.numel() * p.element_size() for p in model.parameters())
