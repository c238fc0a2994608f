#!/usr/bin/env bash
# Guess: dynamic int8 inputs "per token" have a scale for each row of the last dim, max|x| / 127.
# What happens: the scale is max|x| / 127.5, so that the largest value is clipped to 127 steps of 127.5; and a token is an index of the first two dims:
#   an input [N, C] has one scale for all of it, one of four dims [N, H, L, C] one for each [L, C].
# Seen: compressed-tensors 0.20.1, torch 2.13.0, 2026-11-30, CPU. vLLM's kernels divide by 127, a scale for each row.
# Why it matters: what transformers computes on a CPU is not what vLLM will compute; pooled outputs and classification heads have inputs [N, C].
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 compressed-tensors==0.20.1 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import torch, compressed_tensors
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization import apply_quantization_config
print("compressed-tensors", compressed_tensors.__version__, "- distinct scales in the quantized input of a linear layer")
inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
model[0].weight.data = torch.eye(8)  # the output is the quantized input
scheme = QuantizationScheme(targets=["Linear"], input_activations=inputs)
apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}), show_progress=False)
model[0].quantization_status = QuantizationStatus.FROZEN
torch.manual_seed(0)
found = {}
for shape in ((6, 8), (2, 3, 8), (2, 3, 4, 8)):
    x = torch.randn(shape)
    y = model(x)
    # The largest magnitude of a scale's values becomes 127 (or -128) steps of it.
    count = 0
    for dims in range(x.ndim):
        rows, out = x.reshape(*shape[:dims], -1), y.reshape(*shape[:dims], -1)
        s = rows.abs().amax(-1, keepdim=True) / 127.5
        if torch.allclose(out, (rows / s).round().clamp(-128, 127) * s, atol=1e-6):
            count = rows[..., 0].numel(); break
    found[shape] = count
    print(f"{str(list(shape)):14} {count:3} scales of max / 127.5; rows of the last dim: {x[..., 0].numel()}")
assert found == {(6, 8): 1, (2, 3, 8): 6, (2, 3, 4, 8): 6}, found
PY
