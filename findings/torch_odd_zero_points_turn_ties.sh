#!/usr/bin/env bash
# Guess: torch's quantizers round x / scale to the nearest even number and add the zero point, as their fake quantization does and as ONNX
#   and ExecuTorch do; a zero point of 3 and one of 3.0 are the same.
# What happens: fake_quantize_per_channel_affine with zero points of type float, quantize_per_tensor and quantize_per_channel add first
#   and round then. With an odd zero point every tie goes the other way: 0.5 steps is 0 in training and 1 in the quantized tensor, 1.5 is 2
#   and 1. fake_quantize_per_tensor_affine adds after rounding, also with a zero point that is a float tensor.
# Seen: torch 2.13.0, 2026-11-30, CPU with AMX, and the same one emulated with AVX2 alone (QEMU, Haswell).
# Why it matters: ties are no rarity: inputs that are on a grid already (pixels, counts, averages of two levels, a coarser layer behind a
#   finer one) meet them in half of their values, where a comparison of training and file then shows steps that nobody can explain.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np, torch
import torch.ao.quantization.fx._decomposed  # the operators of exported programs
x = torch.arange(-5, 6).repeat(4) / 2
one = torch.ones(1)
def results(zero):
    whole, real = torch.tensor([zero], dtype=torch.int32), torch.tensor([float(zero)])
    return {
        "fake, per tensor": torch.fake_quantize_per_tensor_affine(x, 1.0, zero, -128, 127),
        "fake, per tensor, float zero point": torch.fake_quantize_per_tensor_affine(x, one, real, -128, 127),
        "fake, per channel, int zero points": torch.fake_quantize_per_channel_affine(x[None], one, whole, 0, -128, 127)[0],
        "exported programs": torch.ops.quantized_decomposed.quantize_per_tensor(x, 1.0, zero, -128, 127, torch.int8).float() - zero,
        "fake, per channel, float zero points": torch.fake_quantize_per_channel_affine(x[None], one, real, 0, -128, 127)[0],
        "quantize_per_tensor": torch.quantize_per_tensor(x, 1.0, zero, torch.qint8).dequantize(),
        "quantize_per_channel": torch.quantize_per_channel(x[None], one, whole, 0, torch.qint8).dequantize()[0],
    }
print("torch", torch.__version__, "- x:", x[:11].tolist())
for zero in (2, 3):
    before, after = np.rint(x.numpy()), np.rint(x.numpy() + zero) - zero
    for place, (name, got) in enumerate(results(zero).items()):
        print(f"zero point {zero}, {name}:", got[:11].int().tolist())
        assert (got.numpy() == (before if place < 4 else after)).all(), "the behaviour has changed"
    assert (before == after).all() == (zero == 2)
PY
