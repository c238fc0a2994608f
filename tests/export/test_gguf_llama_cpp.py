"""Files of target `gguf` in llama.cpp itself (`make test-targets`): its next tokens are those of torch."""

import pytest
import torch
from lightning import Trainer

from lq_plugin import QAT, Export, QuantPlan, Rule, calibrate, load_checkpoint, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model, verify

pytest.importorskip("xllamacpp", reason="llama.cpp runs in `make test-targets`")
pytest.importorskip("gguf")
pytest.importorskip("transformers")

from lq_plugin.export.gguf_file.read import llama_log_probabilities
from tests.export.language import KINDS, Language, answers, language, tokens

#: llama.cpp keeps keys and values of attention in float16.
FLOAT_ERROR = 2e-3
#: It rounds activations to 8 bits next to quantized weights.
ROUNDED_ERROR = 0.15


def quantized(weight, model, match="*layers.*"):
    prepare(model, QuantPlan([Rule(match, weight=weight)]))
    calibrate(model, [tokens()])
    return model.eval()


@torch.no_grad()
def torch_log_probabilities(model, x):
    y = model(x)
    return getattr(y, "logits", y).log_softmax(-1)


@pytest.fixture(scope="module")
def learned():
    """State of a float model that has learned the task."""
    module = Language()
    train(module, 100, 2e-3)
    return module.state_dict()


def train(module, steps, learning_rate):
    """Some steps with a learning rate that goes to zero."""
    optimizer = torch.optim.Adam(module.train().parameters(), learning_rate)
    for index, x in enumerate(list(module.train_dataloader())[:steps]):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - index / steps)
        optimizer.zero_grad()
        module.training_step(x, index).backward()
        optimizer.step()
    module.eval()


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    **{kind: {"kind": kind} for kind in KINDS},
    "all heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 128},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures_compute_the_same(name, tmp_path):
    """One layer is quantized, the rest is float32: what differs is an error of the architecture."""
    model, path = quantized("q8_0", language(**MODELS[name]), "model.layers.0.mlp.up_proj"), tmp_path / "net.gguf"
    export_model(model, path, floats="f32")
    x = tokens(2, 24)
    difference = (torch_log_probabilities(model, x) - llama_log_probabilities(path, x)).abs().max()
    assert difference < 10 * FLOAT_ERROR


@pytest.mark.parametrize("spec", ["q4_0", "q8_0", "tq2_0", "tq1_0", "mxfp4", "nvfp4"])
def test_a_trained_model_has_the_same_five_next_tokens(spec, learned, tmp_path):
    """Trained on the grid, then written: embeddings and norms float, all products quantized."""
    module, path, x = Language(), tmp_path / "net.gguf", tokens(3, 8, seed=11)
    module.load_state_dict(learned)
    plan = QuantPlan([Rule("net.model.layers.*", weight=spec), Rule("net.lm_head", weight=spec)])
    prepare(module, plan)
    calibrate(module, [x])
    train(module, 100, 2e-3)
    export_model(module, path)
    mine, theirs = torch_log_probabilities(module, x), llama_log_probabilities(path, x)
    best = mine.topk(5, -1)
    assert torch.equal(best.indices, answers()[x].topk(5, -1).indices)  # it has learned the task
    assert torch.equal(best.indices, theirs.topk(5, -1).indices)
    assert (best.values - theirs.gather(-1, best.indices)).abs().max() < ROUNDED_ERROR
    result = verify(module, path, [x], runtime="xllamacpp")
    assert (result.samples, result.agreement) == (24, 1.0)


def test_a_run_with_qat_writes_what_it_trained(learned, tmp_path):
    module, path, x = Language(), tmp_path / "net.gguf", tokens(3, 8, seed=11)
    module.load_state_dict(learned)
    plan = QuantPlan([Rule("*layers.*", weight="int4 group32")])
    trainer = Trainer(
        max_steps=5, callbacks=[QAT(plan, target="gguf"), Export(path)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module)
    assert str(module.net.model.layers[0].mlp.up_proj.weight_quantizer.spec) == "q4_0"
    mine, theirs = torch_log_probabilities(module.eval(), x), llama_log_probabilities(path, x)
    assert torch.equal(mine.topk(5, -1).indices, theirs.topk(5, -1).indices)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = load_checkpoint(Language, tmp_path / "net.ckpt").eval()
    export_model(again, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_a_file_that_llama_cpp_does_not_load(tmp_path):
    path = tmp_path / "net.gguf"
    export_model(quantized("q4_0", language()), path)
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_cout?"))
    with pytest.raises(ExportError, match=r"llama\.cpp does not load .*net\.gguf"):
        llama_log_probabilities(path, tokens())


TEXTS = (
    "low lower lowest",
    "The newest  widest\n\n 12345 words, aren't they?",
    "Ünïcödé 中文 ok",
    " at both ends ",
)


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "sentencepiece"])
def test_texts_become_the_tokens_of_transformers(kind, tmp_path):
    tokenizer = made_tokenizer(kind, tmp_path / "model")
    size = len(tokenizer)
    model = quantized("q8_0", language(vocab_size=size + 3, num_hidden_layers=1))
    path = tmp_path / "net.gguf"
    export_model(model, path, floats="f32", tokenizer=str(tmp_path / "model"))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert next_token(path, text) == next_token(path, ids), (text, tokenizer.convert_ids_to_tokens(ids))
    # The folder that a model was loaded from is found without being named.
    model.config._name_or_path = str(tmp_path / "model")
    export_model(model, tmp_path / "other.gguf", floats="f32")
    assert (tmp_path / "other.gguf").read_bytes() == path.read_bytes()


def next_token(path, prompt):
    """Returns the most probable tokens after a prompt, a text or numbers, and how many tokens it has."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.verbosity, settings.warmup = str(path), 128, -1, False
    settings.cpuparams.n_threads = 1
    answer = xllamacpp.Server(settings).handle_completions(
        {"prompt": prompt, "n_predict": 1, "n_probs": 20, "cache_prompt": False, "logit_bias": [["!", 1e3]]}
    )
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return answer["usage"]["prompt_tokens"], [(entry["id"], entry["logprob"]) for entry in found]


def made_tokenizer(kind, folder):
    """Returns a small tokenizer of one of the kinds, trained on a few words and saved."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lq_plugin.export.gguf_file.vocabulary import SPLITS

    words = ["low lower lowest new newer newest wide wider widest the The 1234 123 12 they're aren't words, ok? " * 5]
    special = ["<unk>", "<s>", "</s>"]
    if kind == "sentencepiece":
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special)
    else:
        made = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt-2")
        pattern = next((text for text, name in SPLITS.items() if name == kind), "")
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level]
        made.pre_tokenizer = byte_level if kind == "gpt-2" else pre_tokenizers.Sequence(splits)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    if kind == "sentencepiece":  # bytes are ordinary tokens there
        forget_bytes(folder / "tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def forget_bytes(path):
    import json

    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:3]
    path.write_text(json.dumps(content))
