#!/usr/bin/env bash
# Guess: a model keeps its dtype when its compressed weights are decompressed, "dequantize" reads each layer by its own scheme, and what
#   compressed-tensors calls compressible transformers loads.
# What happens: NVFP4 and MXFP4 weights are bfloat16 after the first forward pass, also in a float32 model, which then fails in its first linear
#   layer. "dequantize": true keeps the dtype, but takes the scheme of the first config group for all layers: with several groups it fails, or
#   gives int8 layers the values of int4 ones without a word, by which group is the first.
#   A packed embedding (Embedding is in COMPRESSIBLE_MODULE_TYPES) fails while transformers initializes its `weight`, which is not there.
# Seen: compressed-tensors 0.20.1, transformers 5.24.0, torch 2.13.0, 2026-11-30, CPU.
# Why it matters: float32 is the dtype of a model that was trained at home, and mixed precision the reason for config groups.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 compressed-tensors==0.20.1 transformers==5.24.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import json, torch, compressed_tensors, transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs as Args, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
print("compressed-tensors", compressed_tensors.__version__, "transformers", transformers.__version__)
MXFP4 = Args(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
INT4, INT8 = Args(num_bits=4, strategy="group", group_size=32), Args(num_bits=8, strategy="channel")
FORMATS = {id(MXFP4): "mxfp4-pack-quantized", id(INT4): "pack-quantized", id(INT8): "pack-quantized"}
def scales(w, a):
    rows = w.float().view(len(w), -1, a.group_size or w.shape[1]).abs().amax(-1)
    return torch.exp2(rows.log2().floor() - 2) if a is MXFP4 else (rows / (2 ** (a.num_bits - 1) - 1)).to(w.dtype)
def attempt(what, wanted, dtype, rules, **more):
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
                                      vocab_size=64, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers = {name: next((a for part, a in rules.items() if part in name), None) for name, module in model.named_modules() if hasattr(module, "weight")}
    groups = {f"group_{i}": QuantizationScheme(targets=[n for n, a in layers.items() if a is args], weights=args, format=FORMATS[id(args)])
              for i, args in enumerate(rules.values())}
    tensors = {}
    for key, w in model.state_dict().items():
        args = layers[key.removesuffix(".weight")]
        parts = {"weight": w}
        if args is not None:
            scheme = QuantizationScheme(targets=[], weights=args)
            parts = BaseCompressor.get_value_from_registry(FORMATS[id(args)]).compress({"weight": w, "weight_scale": scales(w, args)}, scheme)
        tensors |= {key.removesuffix("weight") + name: value.contiguous() for name, value in parts.items()}
    formats = {FORMATS[id(args)] for args in rules.values()}
    q = QuantizationConfig(config_groups=groups, format=formats.pop() if len(formats) == 1 else "mixed-precision", quantization_status="compressed")
    config.dtype = dtype
    config.save_pretrained("model"); save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    content = json.load(open("model/config.json")) | {"architectures": ["LlamaForCausalLM"], "quantization_config": q.model_dump(mode="json") | more}
    json.dump(content, open("model/config.json", "w"))
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=dtype); loaded(torch.zeros(1, 4, dtype=torch.long))
        apart = max(float((a.weight - b.weight).abs().max()) for a, b in ((model.lm_head, loaded.lm_head),
                    (model.model.layers[0].self_attn.q_proj, loaded.model.layers[0].self_attn.q_proj)))
        got = "ok" if apart < 0.02 else f"loaded, and weights differ by {apart:.2f}"  # a step of mxfp4 is 0.02 here
    except Exception as error: got = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    print(f"{what:46} {got}")
    assert got.startswith(wanted), got
F, B, D = torch.float32, torch.bfloat16, {"dequantize": True}
attempt("mxfp4, bfloat16 model", "ok", B, {"proj": MXFP4})
attempt("mxfp4, float32 model", "RuntimeError: expected m1 and m2 to have the same dtype", F, {"proj": MXFP4})
attempt('mxfp4, float32 model, "dequantize": true', "ok", F, {"proj": MXFP4}, **D)
attempt("int8 and int4", "ok", F, {"attn": INT8, "mlp": INT4})
attempt('int8 and int4, "dequantize": true', "RuntimeError", F, {"attn": INT8, "mlp": INT4}, **D)
attempt("int4 and int8", "ok", F, {"mlp": INT4, "attn": INT8})
attempt('int4 and int8, "dequantize": true', "loaded, and weights differ", F, {"mlp": INT4, "attn": INT8}, **D)
attempt("int8 head", "ok", F, {"lm_head": INT8})
attempt("int8 embedding", "AttributeError: 'Embedding' object has no attribute 'weight'", F, {"embed_tokens": INT8})
PY
