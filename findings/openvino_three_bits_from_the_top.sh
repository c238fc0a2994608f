#!/usr/bin/env bash
# Guess: OpenVINO's 3-bit constants (u3) are a stream of bits like its 2- and 4-bit ones, the first number in the lowest bits.
# What happens: eight numbers take three bytes in two planes, the lower two bits of four numbers each in the first two and the third
# bits in the last, and the first number has the highest bits of each. A stream of bits is read without an error as other numbers.
# Seen: openvino 2026.4.1, 2026-11-30, CPU.
# Why it matters: weights of 3 bits packed like those of 2 load, and multiply as noise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, openvino as ov
from openvino import opset13 as ops
def read(kind, held, count):
    constant = ov.Tensor(kind, ov.Shape([count]))
    constant.data.reshape(-1).view(np.uint8)[:] = held
    x = ops.parameter([count], np.float32)
    model = ov.Model([ops.add(x, ops.convert(ops.constant(constant), np.float32))], [x])
    return ov.Core().compile_model(model, "CPU")(np.zeros(count, np.float32))[0].astype(int)
numbers = np.random.default_rng(0).integers(0, 8, 800)
def bits(values, count):
    return (values[:, None] >> np.arange(count) & 1).astype(np.uint8)
stream = {n: np.packbits(bits(numbers % (1 << n), n).reshape(-1), bitorder="little") for n in (2, 3, 4)}
low = np.packbits(bits(numbers, 2)[:, ::-1].reshape(-1)).reshape(-1, 2)
planes = np.concatenate([low, np.packbits((numbers >> 2).astype(np.uint8)).reshape(-1, 1)], 1).reshape(-1)
right = {n: float((read(kind, stream[n], 800) == numbers % (1 << n)).mean()) for n, kind in ((2, ov.Type.u2), (3, ov.Type.u3), (4, ov.Type.u4))}
print("openvino", ov.__version__, "- share of numbers read back, packed as a stream of bits:", right, "- 3 bits in planes:", float((read(ov.Type.u3, planes, 800) == numbers).mean()))
assert right[2] == right[4] == 1.0 and right[3] < 0.5
assert (read(ov.Type.u3, planes, 800) == numbers).all()
PY
