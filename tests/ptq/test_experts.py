"""GPTQ and learned rounding of weights that a module's own code multiplies: each expert by its own tokens."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lq_plugin
from lq_plugin.ptq.gptq import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct

EXPERTS, INPUTS, HIDDEN, TOKENS = 4, 24, 32, 90


class Routed(nn.Module):
    """Each token goes to one expert, the last expert gets none; weights `[experts, out, in]`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INPUTS) * INPUTS**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INPUTS, HIDDEN) * HIDDEN**-0.5)

    def forward(self, x):
        ids = torch.arange(len(x)) % (EXPERTS - 1)
        order = ids.argsort(stable=True)
        counts = torch.bincount(ids, minlength=EXPERTS)
        if self.way == "grouped":
            offs = counts.cumsum(0).to(torch.int32)
            hidden = torch.relu(F.grouped_mm(x[order], self.up.transpose(-2, -1), offs=offs))
            y = F.grouped_mm(hidden, self.down.transpose(-2, -1), offs=offs)
            return y[order.argsort()]
        if self.way == "selected":
            hidden = torch.relu(torch.bmm(self.up[ids], x.unsqueeze(-1)))
            return torch.bmm(self.down[ids], hidden).squeeze(-1)
        if self.way == "slots":
            slots = x[order].split(counts.tolist())
            padded = nn.utils.rnn.pad_sequence(list(slots), batch_first=True)
            hidden = torch.relu(torch.einsum("eti,ehi->eth", padded, self.up))
            y = torch.einsum("eth,eih->eti", hidden, self.down)
            kept = torch.cat([part[:count] for part, count in zip(y, counts.tolist(), strict=True)])
            return kept[order.argsort()]
        parts = x[order].split(counts.tolist())
        y = torch.cat([
            F.linear(torch.relu(F.linear(part, up)), down)
            for part, up, down in zip(parts, self.up, self.down, strict=True)
        ])  # fmt: skip
        return y[order.argsort()]


WAYS = ("loop", "grouped", "selected", "slots")
PLAN = "int3 per_channel mse / uint8 affine"


def routed(way="loop"):
    torch.manual_seed(0)
    return Routed(way).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator)
    return [torch.randn(TOKENS, INPUTS, generator=generator) @ mixing for _ in range(2)]


def rounded(model, plan=PLAN, **options):
    lq_plugin.prepare(model, plan)
    lq_plugin.calibrate(model, batches())
    return gptq(model, batches(), **options)


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_is_solved_for_as_a_linear_layer_on_its_tokens(way):
    model = routed(way)
    whole = model.up.detach().clone()
    result = rounded(model)
    assert list(result.layers) == ["up", "down"]
    assert not result.skipped
    quantizer = model.quantized_weights["up"].input_quantizer
    for expert in range(EXPERTS - 1):
        linear = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False)).eval()
        linear[0].weight.data = whole[expert].clone()
        lq_plugin.prepare(linear, PLAN)
        mine = [x[torch.arange(TOKENS) % (EXPERTS - 1) == expert] for x in batches()]
        lq_plugin.calibrate(linear, mine)
        linear[0].input_quantizer.scale.copy_(quantizer.scale)
        linear[0].input_quantizer.zero_point.copy_(quantizer.zero_point)
        gptq(linear, mine)
        assert torch.equal(model.up[expert], linear[0].weight)
    fits = result.layers.values()
    assert all(fit.after < fit.before for fit in fits)
    assert all(fit.nearest_rows >= 1 / EXPERTS for fit in fits)  # the expert without tokens


def test_an_expert_without_tokens_keeps_nearest_rounding():
    model, plain = routed(), routed()
    rounded(model)
    lq_plugin.prepare(plain, PLAN)
    lq_plugin.calibrate(plain, batches())
    nearest = plain.quantized_weights["up"].quantized_weight()
    assert torch.equal(model.up[-1], nearest[-1])
    assert not torch.equal(model.up[0], nearest[0])


def test_the_model_is_nearer_to_the_float_one():
    data = torch.cat(batches())
    expected = routed()(data)
    errors = []
    for solve in (False, True):
        model = routed()
        lq_plugin.prepare(model, PLAN)
        lq_plugin.calibrate(model, batches())
        if solve:
            gptq(model, batches())
        errors.append(float((model(data) - expected).detach().pow(2).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_mixtral():
    transformers = pytest.importorskip("transformers", reason="mixtures of experts as released models have them")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, use_cache=False)).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = [torch.randint(0, 64, (4, 32)) for _ in range(2)]

    def run(batch):
        return model(input_ids=batch).logits

    lq_plugin.prepare(model, "int3 per_channel mse / int8 minmax")
    lq_plugin.calibrate(model, ids, run=run)
    result = gptq(model, ids, run)
    experts = {name: fit for name, fit in result.layers.items() if ".experts." in name}
    assert len(experts) == 4
    assert all(fit.after < 0.95 * fit.before for fit in experts.values())
    assert all(fit.samples == 2 * 4 * 32 * 2 for fit in experts.values())


def test_gptaq_says_why_not():
    result = rounded(routed(), asymmetric=True)
    assert not result.layers
    assert "use GPTQ" in result.skipped["up"]


class Reversed(Routed):
    def forward(self, x):
        return torch.relu(x @ self.up[1:][0].t()) @ self.down[0].t()


def test_a_stack_whose_selections_are_not_followed_keeps_nearest_rounding():
    torch.manual_seed(0)
    model = Reversed("loop").eval()
    before = model.up.detach().clone()
    result = rounded(model)
    assert result.skipped == {"up": "up: its code selects experts in a way that is not followed"}
    assert list(result.layers) == ["down"]
    assert torch.equal(model.up, before)


def test_learned_rounding():
    data = torch.cat(batches())
    expected = routed()(data)
    errors = []
    for learn in (False, True):
        model = routed()
        lq_plugin.prepare(model, PLAN)
        lq_plugin.calibrate(model, batches())
        if learn:
            result = reconstruct(model, batches(), by="layer", iterations=300)
            assert not result.skipped
        errors.append(float((model(data) - expected).detach().pow(2).sum()))
    assert errors[1] < 0.9 * errors[0]
