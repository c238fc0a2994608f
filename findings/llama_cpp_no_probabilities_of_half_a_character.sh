#!/usr/bin/env bash
# Guess: llama.cpp's server gives the probabilities of the next token (`n_probs`) for every prompt.
# What happens: where the token that it draws is the first byte of a longer character, the answer has none at all (`logprobs` is null), of no
#   token. A `logit_bias` that has another token drawn brings them, and does not change them: they are those before the bias.
# Seen: xllamacpp 2026.10.11549 (llama.cpp), 2026-11-30, CPU.
# Why it matters: a comparison of a file with its model on the tokens of a text skips, or fails at, each character that is no token of its own: most of a text in Chinese or Hindi.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/net.gguf" <<'PY'
import json, sys
from importlib.metadata import version
import gguf, numpy as np, xllamacpp as x
path, V, D, F, HALF = sys.argv[1], 64, 64, 64, 2
# One layer of zeros between an embedding and an output: after token t the most probable token is t + 1.
r = np.random.default_rng(0); codes = r.standard_normal((V, D)).astype(np.float32)
W = gguf.GGUFWriter(path, "llama")
W.add_context_length(64); W.add_embedding_length(D); W.add_block_count(1); W.add_feed_forward_length(F); W.add_head_count(2); W.add_head_count_kv(2)
W.add_layer_norm_rms_eps(1e-5); W.add_rope_dimension_count(D // 2); W.add_vocab_size(V)
W.add_tokenizer_model("gpt2"); W.add_tokenizer_pre("gpt-2"); W.add_token_list([f"<{i}>" if i != HALF else "\u00e4" for i in range(V)]); W.add_token_types([1] * V)
W.add_token_merges(["< 0"]); W.add_eos_token_id(V - 1); W.add_add_bos_token(False)
W.add_tensor("token_embd.weight", codes); W.add_tensor("output.weight", np.roll(codes, 1, 0)); W.add_tensor("output_norm.weight", np.ones(D, np.float32))
for n, shape in {"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (D, D), "attn_k": (D, D), "attn_v": (D, D), "attn_output": (D, D),
                 "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}.items():
    W.add_tensor(f"blk.0.{n}.weight", np.zeros(shape, np.float32))
W.write_header_to_file(); W.write_kv_data_to_file(); W.write_tensors_to_file(); W.close()
p = x.CommonParams(); p.model.path = path; p.n_ctx = 64; p.cpuparams.n_threads = 1; p.warmup = False; p.verbosity = -1
server = x.Server(p)
def answer(token, **more):
    a = server.handle_completions({"prompt": [token], "n_predict": 1, "temperature": 0.0, "n_probs": V, "cache_prompt": False, **more})
    a = json.loads(a) if isinstance(a, (str, bytes)) else a
    found = (a["choices"][0].get("logprobs") or {}).get("content") or []
    return {e["id"]: round(e["logprob"], 4) for e in found[0]["top_logprobs"]} if found else None
# What the file says, in numpy: the norm of the embedding times the output.
h = codes / np.sqrt((codes ** 2).mean(1, keepdims=True) + 1e-5); z = h @ np.roll(codes, 1, 0).T
wanted = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
print("xllamacpp", version("xllamacpp"))
ordinary, ends, other = answer(7), answer(HALF - 1), answer(HALF - 1, logit_bias=[[9, 1000.0]])
print("after", 7, "->", max(ordinary, key=ordinary.get), "with", len(ordinary), "probabilities")
print("after", HALF - 1, "-> the byte 0xE4 alone, with", ends and len(ends), "probabilities; with a bias for another token", len(other))
assert len(ordinary) == V and max(abs(ordinary[i] - wanted[7, i]) for i in range(V)) < 0.02, "ordinary prompts behave otherwise now"
assert ends is None, "half a character has probabilities now"
assert max(abs(other[i] - wanted[HALF - 1, i]) for i in range(V)) < 0.02 and max(other, key=other.get) == HALF, "the bias changes the probabilities now"
PY
