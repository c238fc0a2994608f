#!/usr/bin/env bash
# Guess: Q8_0 is nearly lossless, and in every tensor closer to the weights than Q4_0, which has the same blocks of 32 and a scale of the
#   same type for each.
# What happens: for small weights it is the other way round. The scale is float16; Q8_0 stores max / 127, Q4_0 max / 8, which is 16 times
#   as large. Below weights of 0.0078 the scale of Q8_0 is a subnormal number and loses bits: with weights around
#   3e-6 Q8_0 is 21 % off where Q4_0 is 9 %, with 1e-6 a Q8_0 tensor is almost all zeros and Q4_0 11 % off. Nothing is said.
# Seen: gguf 0.19.0, numpy 2.4.6, 2026-11-30, against the formats' formulas by hand.
# Why it matters: differences of weights (LoRA factors, whose product with alpha / r is small), heads that start near zero and layers in
#   front of a norm have such weights; Q8_0 is what one takes to be safe. A factor moved from the tensor into the next one costs nothing.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata, numpy as np
from gguf import GGMLQuantizationType as G
from gguf.quants import dequantize, quantize
draw = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
def error(weights, kind):
    return float(np.linalg.norm(dequantize(quantize(weights, kind), kind) - weights) / np.linalg.norm(weights))
def by_hand(weights):
    step = np.abs(weights).max(1, keepdims=True) / 127
    return float(np.linalg.norm(np.round(weights / step) * step.astype(np.float16).astype(np.float32) - weights) / np.linalg.norm(weights))
print("gguf", importlib.metadata.version("gguf"), "- relative error of Q8_0, by hand, of Q4_0")
seen = {}
for size in (1.0, 1e-4, 1e-5, 3e-6, 1e-6):
    weights = draw * np.float32(size)
    seen[size] = error(weights, G.Q8_0), by_hand(weights), error(weights, G.Q4_0)
    print("deviation", size, [round(value, 4) for value in seen[size]])
assert all(abs(eight - hand) < 1e-3 for eight, hand, _ in seen.values()), "other steps than by hand"
(first, *_, four), (small, *_, smaller) = seen[1.0], seen[1e-6]
assert first < 0.01 and 0.05 < four < 0.12 and small > 0.9 and smaller < 0.15 and seen[3e-6][0] > 2 * seen[3e-6][2], "the behaviour has changed"
PY
