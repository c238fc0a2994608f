#!/usr/bin/env bash
# Guess: next to quantized inputs, weights of 4 and 2 bits are multiplied by the integer kernels that take 8, since int8 holds them all.
# What happens: with constants of 4 and 2 bits the convolution is a float kernel, and the matrix product one that multiplies floats with
# the integers as they stand. A Convert of the same constants to int8 in front, which is computed on loading, makes both integer kernels.
# Seen: openvino 2026.4.1, 2026-11-30, CPU.
# Why it matters: W4A8 and W2A8 models are computed in float, though the file has integers on both sides.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, openvino as ov
from openvino import opset13 as ops
rng = np.random.default_rng(0)
def kernel(kind, bits, convolution, to_int8):
    shape = (32, 32, 3, 3) if convolution else (32, 32)
    q = rng.integers(0, 1 << bits - (kind == ov.Type.i8), shape)
    held = ov.Tensor(kind, ov.Shape(shape))
    fields = (q.reshape(-1, 1) >> np.arange(bits) & 1).astype(np.uint8)
    held.data.reshape(-1).view(np.uint8)[:] = np.packbits(fields.reshape(-1), bitorder="little")
    scale = (rng.random((32, *[1] * (len(shape) - 1))) / 50).astype(np.float32)
    x = ops.parameter([4, 32, 8, 8] if convolution else [4, 32], np.float32)
    levels = ops.fake_quantize(x, np.float32(0), np.float32(255 / 64), np.float32(0), np.float32(255 / 64), 256)
    weight = ops.constant(held)
    if to_int8:
        weight = ops.convert(weight, np.int8)
    weight = ops.multiply(ops.convert(weight, np.float32), scale)
    made = ops.convolution(levels, weight, [1, 1], [1, 1], [1, 1], [1, 1]) if convolution else ops.matmul(levels, weight, False, True)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = ov.Core().compile_model(ov.Model([made], [x]), "CPU", settings)
    if not convolution:
        given = (rng.integers(0, 192, (4, 32)) / 64).astype(np.float32)
        wanted = given @ (q * scale).T
        assert np.abs(compiled(given)[0] - wanted).max() < 1e-3 * np.abs(wanted).max()
    info = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [i["runtimePrecision"].astype(str) for i in info if i["layerType"].astype(str) in ("Convolution", "FullyConnected")][0]
cases = {"i8": (ov.Type.i8, 8), "u4": (ov.Type.u4, 4), "u2": (ov.Type.u2, 2)}
found = {
    (what, name, to_int8): kernel(*case, what == "convolution", to_int8)
    for what in ("convolution", "product") for name, case in cases.items() for to_int8 in (False, True)
}
print("openvino", ov.__version__)
for key, value in found.items():
    print(key[0], key[1], "with a Convert to int8" if key[2] else "as it stands", "->", value)
assert found["convolution", "i8", False] == found["product", "i8", False] == "u8"
assert found["convolution", "u4", False] == found["convolution", "u2", False] == "f32"
assert found["product", "u4", False] == "u4" and found["product", "u2", False] == "u2"
assert all(value == "u8" for key, value in found.items() if key[2])
PY
