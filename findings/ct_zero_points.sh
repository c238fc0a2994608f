#!/usr/bin/env bash
# Guess: transformers loads what compressed-tensors writes, and compressed-tensors reads what it packs.
# What happens: asymmetric "pack-quantized" weights (written by compressed-tensors' own compressor) cannot be loaded by transformers: it keeps
#   a place of the unpacked shape for weight_zero_point, and ends with "size mismatch". With "dequantize": true in quantization_config they
#   load. 4-bit zero points of at most 8 outputs in more than one group cannot be unpacked by compressed-tensors itself ("self.stride(-1)
#   must be 1"); 3 and 8 bits, or one group, can.
# Seen: compressed-tensors 0.20.1, transformers 5.24.0, torch 2.13.0, 2026-11-30, CPU.
# Why it matters: W4A16 with zero points (AWQ's usual form) is one of the presets of llm-compressor, and vLLM has kernels for it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 compressed-tensors==0.20.1 transformers==5.24.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import json, torch, compressed_tensors, transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
print("compressed-tensors", compressed_tensors.__version__, "transformers", transformers.__version__)
packed = BaseCompressor.get_value_from_registry("pack-quantized")
def scheme(bits=4, size=32):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=size))
def compressed(w, scheme):
    a = scheme.weights
    g = w.view(len(w), -1, a.group_size)
    low, high = g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)
    s = (high - low) / (2**a.num_bits - 1)
    z = (-(2 ** (a.num_bits - 1)) - low / s).round().to(torch.int8)
    return packed.compress({"weight": w, "weight_scale": s, "weight_zero_point": z}, scheme)
def attempt(what, call, wanted):
    try: call(); got = "ok"
    except Exception as error: got = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    print(f"{what:50} {got}")
    assert (got == "ok") == wanted, got
torch.manual_seed(0)
config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
                                  vocab_size=64, tie_word_embeddings=False)
model = transformers.LlamaForCausalLM(config)
def folder(**more):
    tensors = {}
    for key, w in model.state_dict().items():
        parts = compressed(w, scheme()) if key.endswith("proj.weight") else {"weight": w}
        tensors |= {key.removesuffix("weight") + name: value.contiguous() for name, value in parts.items()}
    q = QuantizationConfig(config_groups={"group_0": scheme()}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"])
    config.save_pretrained("model"); save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    content = json.load(open("model/config.json")) | {"architectures": ["LlamaForCausalLM"], "quantization_config": q.model_dump(mode="json") | more}
    json.dump(content, open("model/config.json", "w"))
    transformers.AutoModelForCausalLM.from_pretrained("model")(torch.zeros(1, 4, dtype=torch.long))
attempt("asymmetric int4, loaded by transformers", folder, False)
attempt('the same with "dequantize": true', lambda: folder(dequantize=True), True)
for outputs, bits, size, wanted in ((16, 4, 32, True), (9, 4, 32, True), (8, 4, 32, False), (4, 4, 32, False), (8, 4, 64, True), (8, 3, 32, True), (4, 8, 32, True)):
    s = scheme(bits, size)
    attempt(f"int{bits}, {outputs} outputs of 64 inputs, groups of {size}, unpacked", lambda: packed.decompress(compressed(torch.randn(outputs, 64), s), s), wanted)
PY
