"""The accuracy benchmark of the pretrained transformer, with a random one of the same kind: no package is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import ptq_accuracy, ptq_transformer, transformer
from lq_plugin.model.prepare import quantized_layers

SIGNS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "c", "O", "N", "Br", "(", ")", "=", "1", ".", ">>", "[nH]"]
VOCABULARY = {sign: index for index, sign in enumerate(SIGNS)}
CONFIG = {
    "vocab_size": len(SIGNS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "output_past": True,
}  # fmt: skip


def random_reactions(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return ["".join(generator.choice(SIGNS[5:], generator.integers(6, 20))) for _ in range(count)]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, dict[str, int], list[str]]:
    pytest.importorskip("transformers", reason="the model is one of transformers")
    torch.manual_seed(0)
    model = transformer.bert(CONFIG)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(8)  # predictions that differ from place to place
    found = model, VOCABULARY, random_reactions(60)
    monkeypatch.setattr(transformer, "load_transformer", lambda: found)
    monkeypatch.setattr(transformer, "CALIBRATION", 12)
    monkeypatch.setattr(transformer, "TEST", 24)
    monkeypatch.setattr(transformer, "BATCH_SIZE", 6)
    return found


def test_reactions_are_read_sign_by_sign() -> None:
    known = {**VOCABULARY, "[C@@H]": 20, "%12": 21}
    assert transformer.encode("CBr.[nH]>>[C@@H]%12(=O)Cl", known) == [2, 5, 9, 14, 16, 15, 20, 21, 10, 12, 7, 11, 1, 3]
    with pytest.raises(ValueError, match=r"'C!' holds characters that are no SMILES"):
        transformer.encode("C!", known)


def test_masks_are_fixed_and_hide_about_a_seventh() -> None:
    rows = [transformer.encode(reaction, VOCABULARY) for reaction in random_reactions(200)]
    batches, again = (transformer.masked_batches(rows, VOCABULARY, 32, 3) for _ in range(2))
    other = transformer.masked_batches(rows, VOCABULARY, 32, 4)
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert not all(torch.equal(a.chosen, b.chosen) for a, b in zip(batches, other, strict=True))
    restored = []
    for batch in batches:
        ids, mask = batch.inputs["input_ids"].clone(), batch.inputs["attention_mask"]
        assert (ids[batch.chosen] == VOCABULARY["[MASK]"]).all()
        ids[batch.chosen] = batch.tokens
        restored += [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    assert sorted(restored) == sorted(rows)  # nothing else has changed
    hidden, free = sum(len(batch.tokens) for batch in batches), sum(len(row) - 2 for row in rows)
    assert hidden / free == pytest.approx(0.15, abs=0.03)


def test_scores_are_those_of_numpy() -> None:
    generator = np.random.default_rng(1)
    logits, float_logits = generator.normal(size=(2, 50, 7))
    tokens = generator.integers(0, 7, 50)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (float_logits, logits))
    found = transformer.scores(torch.tensor(np.log(q)), torch.tensor(np.log(p)), torch.tensor(tokens))
    assert found == pytest.approx(
        {
            "accuracy": 100 * np.mean(q.argmax(1) == tokens),
            "agreement": 100 * np.mean(q.argmax(1) == p.argmax(1)),
            "loss": -np.mean(np.log(q[np.arange(50), tokens])),
            "divergence": np.mean(np.sum(p * np.log(p / q), 1)),
        }
    )


def test_json_has_the_promised_form(
    loaded: tuple[nn.Module, dict[str, int], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    plans, methods = ["W8A8 dynamic", "W4 g32"], ["nearest", "smooth", "rotate", "gptq", "brecq"]
    arguments = ["--model", "transformer", "--seeds", "2", "--iterations", "5", "--peers", "--json", str(out)]
    ptq_accuracy.main([*arguments, "--plans", *plans, "--methods", *methods])
    content = json.loads(out.read_text())
    first, *rows = content["results"]
    assert (first["plan"], first["divergence"], first["agreement"]) == ("float", 0.0, 100.0)
    assert [(row["plan"], row["method"]) for row in rows] == [(plan, method) for plan in plans for method in methods]
    nearest = {row["plan"]: row for row in rows if row["method"] == "nearest"}
    for row in rows:
        assert row["divergence"] > 0
        assert len(row["divergences"]) == (1 if row["method"] == "nearest" else 2)
        assert row["divergence"] == pytest.approx(np.mean(row["divergences"]))
        if row["method"] != "nearest":
            share = 1 - row["divergence"] / nearest[row["plan"]]["divergence"]
            assert row["won_back"] == pytest.approx(100 * share, abs=0.051)
    assert nearest["W8A8 dynamic"]["divergence"] < 0.1 * nearest["W4 g32"]["divergence"]
    assert content["masked_tokens"] > 24
    assert content["environment"]["threads"] == 1
    assert "W4 g32" in capsys.readouterr().out
    ptq_accuracy.main([*arguments, "--add", "--plans", "W4 g32", "--methods", "nearest", "adaround"])
    *kept, added = json.loads(out.read_text())["results"]
    assert (added["method"], kept) == ("adaround", content["results"])
    with pytest.raises(SystemExit, match="was made with another iterations"):
        ptq_accuracy.main([*arguments, "--add", "--iterations", "6"])


@pytest.mark.parametrize("plan", list(ptq_transformer.PLANS))
def test_the_encoder_s_layers_have_the_plan_s_specs(
    loaded: tuple[nn.Module, dict[str, int], list[str]], plan: str
) -> None:
    model, vocabulary, reactions = loaded
    rows = [transformer.encode(reaction, vocabulary) for reaction in reactions[:12]]
    batches = transformer.masked_batches(rows, vocabulary, 6, 0)
    result = ptq_transformer.quantized(model, plan, "nearest", batches, 1, 0)
    layers = dict(quantized_layers(result))
    assert list(layers) == [
        n for n, m in model.bert.encoder.named_modules(prefix="bert.encoder") if type(m) is nn.Linear
    ]
    weight, inputs = ptq_transformer.PLANS[plan]
    for layer in layers.values():
        assert str(layer.weight_quantizer.spec) == weight
        assert inputs is None or str(layer.input_quantizer.spec) == inputs
    assert not quantized_layers(model)
