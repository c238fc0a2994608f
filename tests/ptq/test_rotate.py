"""Rotations that fold: the float function as it was, the stream turned, outliers tamed, and what is left alone."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, CalibrationError, PlanError, QuantizationError, QuantPlan, Rule, calibrate, prepare, remove
from lq_plugin.ptq import run_phases
from lq_plugin.ptq.rotation.rotate import HeadPair, Stream, rotate

SIZE, HEADS = 16, 2


class RootMean(nn.Module):
    """RMSNorm as models of transformers write it, with a factor that is not the weight itself where `offset` is 1."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(size)), offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.weight + self.offset)


class MyRMSNorm(RootMean):
    pass


class Block(nn.Module):
    """A pre-norm layer with projections of its own."""

    def __init__(self, norm: Any, size: int = SIZE) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(size), norm(size)
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(size, 24), nn.Linear(size, 24), nn.Linear(24, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Net(nn.Module):
    def __init__(self, norm: Any, size: int = SIZE, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, size), nn.Parameter(torch.randn(1, 5, size))
        self.layers = nn.Sequential(*(Block(norm, size) for _ in range(layers)))
        self.norm, self.head = norm(size), nn.Linear(size, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(tokens) + self.place)))


def net_of(norm: Any, size: int = SIZE) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net(norm, size).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))
    return net, torch.randint(0, 11, (6, 5))


NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm, "of its own": MyRMSNorm}


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "orthogonal"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_function_stays_and_the_stream_is_turned(norm: str, kind: str | None) -> None:
    net, tokens = net_of(NORMS[norm])
    expected, before = net(tokens), copy.deepcopy(net)
    tensors = {name: id(parameter) for name, parameter in net.named_parameters()}
    result = rotate(net, tokens, kind=kind, seed=3)
    assert not result.refused
    (stream,) = result.streams
    assert isinstance(stream, Stream)
    assert stream.keeps_mean is (norm == "LayerNorm")
    assert set(stream.writers) == {
        "embed", "place", "layers.0.out", "layers.0.down", "layers.1.out", "layers.1.down"
    }  # fmt: skip
    assert dict(stream.norms)["layers.1.norm2"] == ("layers.1.gate", "layers.1.up")
    assert result.heads == tuple(HeadPair(f"layers.{i}.v", f"layers.{i}.out", SIZE // HEADS) for i in (0, 1))
    assert torch.allclose(net(tokens), expected, rtol=1e-4, atol=1e-5)
    assert result.change < 1e-5
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == tensors
    # What numpy makes of the formulas, in float64.
    q = result.matrices["embed"].numpy()
    r = result.matrices["layers.0.v"].numpy()
    both = np.kron(np.eye(HEADS), r)
    old = {name: parameter.double().numpy() for name, parameter in before.named_parameters()}
    new = {name: parameter.double().numpy() for name, parameter in net.named_parameters()}
    assert np.allclose(q.T @ q, np.eye(SIZE), atol=1e-12)
    gamma = old["layers.0.norm1.weight"]
    beta = old.get("layers.0.norm1.bias", np.zeros(SIZE))
    assert np.allclose(new["embed.weight"], old["embed.weight"] @ q, atol=1e-6)
    assert np.allclose(new["layers.0.q.weight"], old["layers.0.q.weight"] * gamma @ q, atol=1e-5)
    assert np.allclose(new["layers.0.q.bias"], old["layers.0.q.bias"] + old["layers.0.q.weight"] @ beta, atol=1e-5)
    assert np.allclose(new["layers.0.v.weight"], both.T @ (old["layers.0.v.weight"] * gamma) @ q, atol=1e-5)
    assert np.allclose(new["layers.0.out.weight"], q.T @ old["layers.0.out.weight"] @ both, atol=1e-5)
    assert np.allclose(new["layers.0.out.bias"], old["layers.0.out.bias"] @ q, atol=1e-5)
    assert (new["layers.0.norm1.weight"] == 1).all()
    # And the stream itself is x Q.
    x, y = (m.layers[0](m.embed(tokens) + m.place).double().numpy() for m in (before, net))
    assert np.allclose(y, x @ q, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_planted_outliers_cost_less(norm: str) -> None:
    """Two channels of the stream are 30 times the others, as massive activations of language models are."""
    net, tokens = net_of(NORMS[norm], 64)
    net.embed.weight[:, [3, 40]] *= 30.0
    expected = net(tokens)

    def noise(phases: list[Any]) -> float:
        model = copy.deepcopy(net)
        plan = QuantPlan([Rule("layers.*", weight="int8 per_channel", input="int4 per_token dynamic")])
        context = run_phases(model, plan, [tokens], phases)
        assert "rotate" not in context.results or len(context.results["rotate"].streams) == 1
        return 20 * float(torch.log10(expected.norm() / (model(tokens) - expected).norm()))

    plain, turned = noise(["calibrate"]), noise(["rotate", "calibrate"])
    assert turned > plain + 3.0


@torch.no_grad()
def test_a_llama_of_transformers_is_rotated_and_quantized() -> None:
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 2.0)
    tokens = torch.randint(0, 50, (3, 7))
    expected = model(input_ids=tokens).logits
    context = run_phases(
        model,
        QuantPlan([Rule("model.layers.*", weight="int8 per_channel", input="int8 per_token dynamic")]),
        [tokens],
        ["rotate", "smooth_quant", "calibrate"],
        run=lambda x: model(input_ids=x),
    )
    result = context.results["rotate"]
    assert not result.refused
    assert [stream.size for stream in result.streams] == [48]
    assert [pair.size for pair in result.heads] == [12, 12]
    assert result.change < 1e-5
    assert (model(input_ids=tokens).logits - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_post_norm_and_tied_models_say_why_not(caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers", reason="the models are of transformers")
    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        ),
        add_pooling_layer=False,
    ).eval()
    tokens = torch.randint(0, 20, (2, 6))
    expected = bert(tokens).last_hidden_state
    result = rotate(bert, tokens)
    assert not result.streams
    assert any(
        "post-norm" in refusal.reason or "which is no linear layer" in refusal.reason for refusal in result.refused
    )
    assert [pair.value for pair in result.heads] == ["encoder.layer.0.attention.self.value"]
    assert torch.allclose(bert(tokens).last_hidden_state, expected, atol=1e-5)

    net, tokens = net_of(nn.RMSNorm)
    net.head = nn.Linear(SIZE, 11, bias=False)
    net.head.weight = net.embed.weight
    state = copy.deepcopy(net.state_dict())
    (refusal,) = rotate(net, tokens, heads=False).refused
    assert "is shared with" in refusal.reason
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    with caplog.at_level(logging.INFO):
        run_phases(net, "w8", [tokens], [{"rotate": {"heads": False}}, "calibrate"])
    assert "not rotated: 'other_add_0': 'embed': 'embed.weight' is shared with 'head.weight'" in caplog.text


def replaced(**parts: Any) -> tuple[Net, Tensor]:
    net, tokens = net_of(nn.RMSNorm)
    for name, part in parts.items():
        setattr(net.layers[1], name, part)
    return net, tokens


class GemmaRMSNorm(RootMean):
    """Its factor is 1 + weight."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 1.0)
        self.weight.data.uniform_()


class MaxNorm(RootMean):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True) * self.weight


REFUSED = {
    "its weight is no plain factor": lambda: replaced(norm1=GemmaRMSNorm(SIZE)),
    "which is no linear layer or embedding": lambda: replaced(down=nn.Sequential(nn.Linear(24, SIZE), nn.Tanh())),
    "which is no linear layer$": lambda: replaced(gate=nn.Sequential(nn.Tanh(), nn.Linear(SIZE, 24))),
    "it computes something else on rotated channels": lambda: replaced(norm1=MaxNorm(SIZE)),
}


@torch.no_grad()
@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_change_the_function_is_refused(reason: str) -> None:
    net, tokens = REFUSED[reason]()
    state = copy.deepcopy(net.state_dict())
    result = rotate(net, tokens, heads=False)
    assert not result.streams
    (refusal,) = result.refused
    assert re.search(reason, refusal.reason), refusal
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


class Attention(L.LightningModule):
    """Its heads lie side by side, or every other channel is one head; its step only logs."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(SIZE, SIZE) for _ in range(4))
        self.head, self.interleaved = nn.Linear(SIZE, 4), interleaved

    def forward(self, x: Tensor) -> Tensor:
        parts = [part(x) for part in (self.q, self.k, self.v)]
        if self.interleaved:
            q, k, v = (part.unflatten(2, (-1, HEADS)).permute(0, 3, 1, 2) for part in parts)
            return self.head(self.out(F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).flatten(2)))
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.head(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", self(batch[0]).square().mean())


RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "the outputs": lambda y: y,
    "a loss": lambda y: y.square().mean(),
    "integers": lambda y: y.argmax(-1),
    "nothing": lambda y: None,
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("returned", RETURNED)
def test_a_layout_of_heads_that_the_batch_disproves_is_put_back(returned: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = Attention(interleaved=True).to(dtype).eval(), torch.randn(3, 5, SIZE, dtype=dtype)
    state = copy.deepcopy(net.state_dict())
    result = rotate(net, x, lambda batch: RETURNED[returned](net(batch)))
    assert not result.heads
    assert not result.matrices
    (refusal,) = result.refused
    assert refusal.name == "v"
    assert "the outputs of the recorded batch would differ by" in refusal.reason
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    right = Attention(interleaved=False).to(dtype).eval()
    expected = right(x)
    assert rotate(right, x, lambda batch: RETURNED[returned](right(batch))).heads == (HeadPair("v", "out", 8),)
    assert (right(x) - expected).norm() < (1e-5 if dtype is torch.float32 else 5e-2) * expected.norm()


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_step_that_only_logs_proves_it_too(interleaved: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Attention(interleaved).eval(), torch.randn(8, 5, SIZE)
    data = DataLoader(TensorDataset(x), batch_size=4)
    state, expected = copy.deepcopy(net.state_dict()), net(x).detach()
    callback = PTQ("w8a8", phases=["rotate", "calibrate"], dataloader=data)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    trainer.validate(net, data, verbose=False)
    remove(net)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == (set() if interleaved else {"v.weight", "v.bias", "out.weight"})
    assert torch.allclose(net.eval()(x), expected, rtol=1e-4, atol=1e-5)


class NormOfSequences(RootMean):
    """Norm that takes the largest channel of sequences, which a trial on single tokens does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True) * self.weight if x.dim() == 3 else super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("returned", RETURNED)
def test_a_wrong_stream_is_put_back_whatever_the_run_returns(returned: str) -> None:
    net, tokens = replaced(norm1=NormOfSequences(SIZE))
    state = copy.deepcopy(net.state_dict())
    result = rotate(net, tokens, lambda batch: RETURNED[returned](net(batch)), heads=False)
    assert not result.streams
    (refusal,) = result.refused
    assert "the outputs of the recorded batch would differ by" in refusal.reason
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@torch.no_grad()
def test_without_anything_to_compare_it_is_refused() -> None:
    """A reader of the norm that also writes the stream is turned with it, and nothing else reads the norm."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.mlp = nn.Linear(3, 8), nn.RMSNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> None:
            x = self.embed(x)
            x + self.mlp(self.norm(x))

    net = Written().eval()
    state = copy.deepcopy(net.state_dict())
    result = rotate(net, torch.randn(4, 3))
    assert not result.streams
    assert "nothing shows that the function stays" in result.refused[0].reason
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@torch.no_grad()
def test_infinite_outputs_that_stay_are_no_change() -> None:
    net, tokens = net_of(nn.RMSNorm)
    net.head.bias[0] = -torch.inf
    net.head.bias[1] = torch.nan
    result = rotate(nn.ModuleDict({"net": net}), tokens, net)
    assert "not floating point, or holds NaN or Inf" in result.refused[0].reason
    assert len(result.heads) == 2
    assert result.change < 1e-5


@torch.no_grad()
def test_values_that_overflow_put_earlier_parts_back() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Net(nn.RMSNorm), Net(nn.RMSNorm)
            self.b.norm.weight.fill_(1e25)
            self.b.head.weight.fill_(1e25)

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.a(tokens)
            self.b(tokens)
            return y

    torch.manual_seed(0)
    net, tokens = Two().eval(), torch.randint(0, 11, (6, 5))
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(QuantizationError, match=r"'b.head.weight': the new values are not finite in torch.float32"):
        rotate(net, tokens)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


class Interrupted(BaseException):
    pass


@torch.no_grad()
def test_what_the_proving_run_raises_puts_all_back() -> None:
    """A run that is interrupted, at each of its calls in turn: no value stays changed, no hook stays."""
    net, tokens = net_of(nn.RMSNorm)
    state = copy.deepcopy(net.state_dict())
    changed_before = 0
    for last in range(100):
        calls = 0

        def run(batch: Tensor, last: int = last) -> Tensor:
            nonlocal calls, changed_before
            if calls == last:
                changed_before += not all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
                raise Interrupted
            calls += 1
            result: Tensor = net(batch)
            return result

        try:
            assert len(rotate(net, tokens, run).heads) == 2
        except Interrupted:
            assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
            assert not any(module._forward_hooks for module in net.modules())
        else:
            break
    assert changed_before >= 3  # of the stream and of both pairs


@torch.no_grad()
def test_impossible_requests_change_nothing() -> None:
    net, tokens = net_of(nn.RMSNorm, 36)
    state = copy.deepcopy(net.state_dict())
    for options, message in (
        ({"kind": "fourier"}, "kind is 'hadamard', 'orthogonal' or None, got 'fourier'"),
        ({"seed": 1.5}, "seed is an integer, got 1.5"),
        ({"heads": 1}, "heads is True or False, got 1"),
        ({"kind": "hadamard"}, "'embed': no Hadamard matrix of size 36 is known here"),
    ):
        with pytest.raises(QuantizationError, match=f"(?s)cannot rotate.*{message}"):
            rotate(net, tokens, **options)
    with pytest.raises(PlanError, match="'rotate'.*'smooth_quant'|'smooth_quant'.*'rotate'|rotate"):
        run_phases(net, "w8", [tokens], ["smooth_quant", "rotate", "calibrate"])
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    prepare(net, "w8")
    calibrate(net, [tokens])
    with pytest.raises(CalibrationError, match="cannot rotate: .* quantizers have ranges already .*rotate before"):
        rotate(net, tokens)
