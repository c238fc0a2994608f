"""Target `gguf`: what the package gguf reads in its files is what the model computes with, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.commands.export import run_export
from lq_plugin.errors import ExportError, PlanError
from lq_plugin.export import export_model, verify
from lq_plugin.export.gguf_file.read import load_gguf
from lq_plugin.export.planned import plan_for, refuse_for_target
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS
from lq_plugin.model.measure.cost import spec_bits
from tests.export.test_cli import composed

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from tests.export.language import KINDS, TOKENS, Language, language, tokens  # noqa: E402

BITS = {"q4_0": 4.5, "q8_0": 8.5, "tq2_0": 2.0625, "tq1_0": 1.6875, "mxfp4": 4.25, "nvfp4": 4.5}
FORMATS = [*BITS, "tq2_0:exact", "mxfp4:rceil", "nvfp4:unit"]


def quantized(weight, model=None, match="*layers.*", **options):
    model = language(**options) if model is None else model
    prepare(model, QuantPlan([Rule(match, weight=weight)]))
    calibrate(model, [tokens()])
    return model.eval()


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def neighbours(rows, heads):
    """Rows of Q or K as llama.cpp turns them: element i of the first half, then element i of the second."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


@pytest.mark.parametrize("spec", FORMATS)
def test_the_packing_error_is_zero(spec, tmp_path):
    model, path = quantized(spec), tmp_path / "net.gguf"
    assert export_model(model, path) == path.stat().st_size
    found, name = tensors(path), spec.partition(":")[0]
    parts = {
        "attn_q": ("self_attn.q_proj", 4), "attn_k": ("self_attn.k_proj", 2), "attn_v": ("self_attn.v_proj", 0),
        "attn_output": ("self_attn.o_proj", 0), "ffn_gate": ("mlp.gate_proj", 0), "ffn_up": ("mlp.up_proj", 0),
        "ffn_down": ("mlp.down_proj", 0),
    }  # fmt: skip
    for index in (0, 1):
        for part, (ours, heads) in parts.items():
            layer = model.get_submodule(f"model.layers.{index}.{ours}")
            weight = layer.quantized_weight().detach().numpy()
            tensor = found[f"blk.{index}.{part}.weight"]
            assert tensor.tensor_type.name == name.upper()
            assert tensor.n_bytes * 8 == BITS[name] * weight.size
            scales = 32 * (name == "nvfp4")
            assert spec_bits(layer.weight_quantizer.spec, weight.shape) == tensor.n_bytes * 8 + scales
            expected = neighbours(weight, heads) if heads else weight
            if spec == "nvfp4":
                # The product of element, E4M3 scale and the tensor's scale is rounded in another order.
                scaled = read(tensor) * found[f"blk.{index}.{part}.scale"].data
                np.testing.assert_allclose(scaled, expected, rtol=2.0**-23)
            else:
                np.testing.assert_array_equal(read(tensor), expected)


@pytest.mark.parametrize("floats", ["f32", "f16", "bf16"])
def test_what_stays_float(floats, tmp_path):
    model, path = quantized("q8_0"), tmp_path / "net.gguf"
    export_model(model, path, floats=floats)
    found = tensors(path)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[floats]
    for name, key in {"token_embd": "model.embed_tokens", "output": "lm_head"}.items():
        assert found[f"{name}.weight"].tensor_type.name == floats.upper()
        expected = model.get_parameter(f"{key}.weight").detach().to(dtype).float().numpy()
        np.testing.assert_array_equal(read(found[f"{name}.weight"]), expected)
    for name, key in {"output_norm": "model.norm", "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm"}.items():
        assert found[f"{name}.weight"].tensor_type.name == "F32"
        np.testing.assert_array_equal(found[f"{name}.weight"].data, model.get_parameter(f"{key}.weight").detach())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_into_a_float_model_bit_for_bit(kind, tmp_path):
    """Biases of Qwen2, norms of heads of Qwen3, another order of rows: each architecture."""
    model, path = quantized("q4_0", kind=kind), tmp_path / "net.gguf"
    export_model(model, path, floats="f32")
    result = verify(model, path, [tokens()], lambda: language(kind))
    assert (result.samples, result.bit_equal) == (16, True)
    names = set(tensors(path))
    assert ("blk.0.attn_q.bias" in names) == (kind == "qwen2")
    assert ("blk.0.attn_q_norm.weight" in names) == (kind == "qwen3")


def test_a_module_that_holds_a_model(tmp_path):
    module, path = Language(), tmp_path / "net.gguf"
    quantized("q4_0", module, "net.model.layers.*")
    export_model(module, path, floats="f32")
    assert verify(module, path, [tokens()], Language).bit_equal


def test_tied_embeddings_are_stored_once_where_they_are_equal(tmp_path):
    path = tmp_path / "net.gguf"
    both = quantized("q8_0", match="*", tie_word_embeddings=True)
    export_model(both, path, floats="f32")
    assert "output.weight" not in tensors(path)
    assert verify(both, path, [tokens()], lambda: language(tie_word_embeddings=True)).bit_equal
    head = quantized("q8_0", match="lm_head", tie_word_embeddings=True)
    export_model(head, path, floats="f32")
    found = tensors(path)
    assert (found["token_embd.weight"].tensor_type.name, found["output.weight"].tensor_type.name) == ("F32", "Q8_0")
    assert verify(head, path, [tokens()], lambda: language(tie_word_embeddings=True)).bit_equal


def test_metadata_are_those_of_the_model(tmp_path):
    path = tmp_path / "net.gguf"
    export_model(
        quantized("tq2_0", rms_norm_eps=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), path
    )
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    expected = {
        "general.architecture": "llama", "general.file_type": gguf.LlamaFileType.MOSTLY_TQ2_0.value,
        "general.quantization_version": 2, "llama.context_length": 128, "llama.embedding_length": 256,
        "llama.block_count": 2, "llama.feed_forward_length": 512, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 64, "llama.rope.freq_base": 5e5,
        "llama.vocab_size": TOKENS, "tokenizer.ggml.tokens": [f"<{index}>" for index in range(TOKENS)],
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("weight", "inputs", "message"),
    [
        ("int4 group32 mse", None, r"q_proj.weight \(int4 group32 mse\): a GGUF .*; the nearest that fits is 'q4_0'"),
        ("int8 per_channel", None, r"a GGUF file holds weights as q4_0, .* the nearest that fits is 'q8_0'"),
        ("twn", None, "the nearest that fits is 'tq2_0'"),
        (
            "q4_0",
            "uint8 affine mse",
            r"q_proj.input \(.*\): llama.cpp rounds activations itself, to 8 bits: leave them",
        ),
    ],
)
def test_a_plan_is_refused_before_any_training(weight, inputs, message):
    model = language()
    prepare(model, QuantPlan([Rule("model.layers.*", weight=weight, input=inputs)]))
    with pytest.raises(PlanError, match=message):
        refuse_for_target(model, QuantPlan([Rule("*", weight=weight)], target="gguf"))


def test_layers_that_a_type_cannot_hold_are_named():
    model = quantized("tq2_0", hidden_size=128, head_dim=32)
    faults = TARGETS["gguf"].faults(Request(model=model))
    reason = "rows of 128 elements are no whole blocks of 256; the nearest that fits is 'q4_0'"
    assert f"model.layers.0.self_attn.q_proj.weight (tq2_0): {reason}" in faults
    assert not any("down_proj" in fault for fault in faults)  # it has rows of 512
    assert not TARGETS["gguf"].faults(Request(model=quantized("nvfp4:unit", match="*")))
    model = quantized("nvfp4", match="*")
    (fault,) = TARGETS["gguf"].faults(Request(model=model))
    assert fault.startswith("model.embed_tokens.weight (nvfp4): llama.cpp knows no scale of the whole tensor")


class Beside(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models, self.head = nn.ModuleList(models), nn.Linear(4, 4)


def test_what_llama_cpp_does_not_compute_is_refused():
    def faults(model):
        return "\n".join(TARGETS["gguf"].faults(Request(model=model)))

    assert (
        "Sequential: a GGUF file holds causal language models of transformers (llama, mistral, qwen2, qwen3)"
        in faults(nn.Sequential(nn.Linear(4, 4)))
    )
    assert "Beside has 2 language models (models.0, models.1)" in faults(Beside(language(), language()))
    assert "head.weight is a parameter outside of the language model" in faults(Beside(language()))
    assert "hidden_act is 'gelu', llama.cpp computes silu" in faults(language(hidden_act="gelu"))
    assert "its attention sees 16 tokens (config.sliding_window)" in faults(language("mistral", sliding_window=16))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "its RoPE is 'dynamic'" in faults(language(rope_parameters=dynamic))
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert "llama.cpp's 'qwen2' reads no factors" in faults(language("qwen2", rope_parameters=linear))
    assert "outside" not in faults(quantized("q4_0")) + faults(language())


def test_options_and_files_that_are_none(tmp_path):
    model, path = quantized("q4_0"), tmp_path / "net.gguf"
    with pytest.raises(ExportError, match="floats is f16, bf16, f32, got 'int8'"):
        export_model(model, path, floats="int8")
    with pytest.raises(ExportError, match=r"tokenizer is a folder with a tokenizer\.json, got '/no'"):
        export_model(model, path, tokenizer="/no")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"lm_head\.weight has numbers beyond 65504"):
        export_model(model, path)
    assert not path.exists()
    export_model(model, path, floats="bf16")
    whole = path.read_bytes()
    for content in (b"", b"GGUF", whole[:1000], b"no file of that kind"):
        path.write_bytes(content)
        with pytest.raises(ExportError, match=r"net\.gguf is no GGUF file, or a damaged one"):
            load_gguf(language(), path)
    path.write_bytes(whole)
    with pytest.raises(ExportError, match=r"blk\.2\.attn_norm\.weight"):
        load_gguf(language(num_hidden_layers=3), path)
    with pytest.raises(
        ExportError, match=r"gate_proj\.weight has shape \[256, 256\] here and \[512, 256\] in the file"
    ):
        load_gguf(language(intermediate_size=256), path)
    with pytest.raises(ExportError, match=r"give verify\(\.\.\., fresh=lambda"):
        verify(model, path, [tokens()])


def test_a_plan_for_the_target_is_on_its_grid():
    plan = QuantPlan([Rule("*", weight="int8 per_channel"), Rule("*mlp*", weight="int4 group32")])
    assert [str(rule.weight) for rule in plan_for(plan, "gguf").rules] == ["q8_0", "q4_0"]
    # What the types do not have is left for a refusal.
    plan = QuantPlan([Rule("*", weight="int4 group64"), Rule("*", weight="int4 mse", input="int8")])
    assert plan_for(plan, "gguf").rules == plan.rules


def test_the_command_writes_and_verifies_it(tmp_path, caplog):
    plan = "plan={rules: [{match: 'net.model.layers.*', weight: q4_0}], target: gguf}"
    model = ["~model", "+model={_target_: tests.export.language.Language}"]
    with caplog.at_level("INFO"):
        path = run_export(composed(tmp_path, "to=gguf", plan, *model, "~data", "phases=[calibrate]"))
    assert path == tmp_path / "model.gguf"
    assert tensors(path)["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    with pytest.raises(ExportError, match="DigitsCNN: a GGUF file holds causal language models"):
        run_export(composed(tmp_path, "to=gguf", "plan=q4_0"))


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path):
    model, content = quantized("q4_0"), {"model": {"type": "Unigram", "vocab": []}}
    for content, message in (
        ({"model": {"type": "Unigram", "vocab": []}}, "its tokenizer is 'Unigram'"),
        (
            {"model": {"type": "BPE", "vocab": {str(i): i for i in range(65)}, "merges": []}},
            "has 65 tokens, the model 64",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}},
            "none of gpt-2, llama-bpe, qwen2 in llama.cpp: .*Whitespace",
        ),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ExportError, match=message):
            export_model(model, tmp_path / "net.gguf", tokenizer=str(tmp_path))
    assert not (tmp_path / "net.gguf").exists()
