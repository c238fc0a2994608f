#!/usr/bin/env bash
# Guess: OpenVINO has no 2-bit weights: its reader refuses INT2 of ONNX files.
# What happens: its own files (IR) hold constants of type u2, a quarter of u8, and the CPU plugin multiplies with them as they stand.
# Seen: openvino 2026.4.1, 2026-11-30, CPU.
# Why it matters: smallest=4, the way around the reader, makes the file twice as large.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import os, sys, tempfile, numpy as np, openvino as ov
from openvino import opset13 as ops
K = N = 512
folder, rng = tempfile.mkdtemp(), np.random.default_rng(0)
def product(kind, bits):
    q, scale, x = rng.integers(0, 4, (N, K)), rng.random((N, 1)).astype(np.float32) + 0.5, rng.standard_normal((1, K)).astype(np.float32)
    held = ov.Tensor(kind, ov.Shape([N, K]))
    packed = np.packbits((q.reshape(-1, 1) >> np.arange(bits) & 1).astype(np.uint8).reshape(-1), bitorder="little")
    held.data[:] = packed if bits < 8 else packed.reshape(N, K)
    read = ops.parameter([-1, K], np.float32)
    real = ops.multiply(ops.subtract(ops.convert(ops.constant(held), np.float32), np.float32(2)), scale)
    ov.save_model(ov.Model([ops.matmul(read, real, False, True)], [read]), folder + "/m.xml", compress_to_fp16=False)
    compiled = ov.Core().compile_model(folder + "/m.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    error = np.abs(compiled(x)[0] - x @ ((q - 2) * scale).T).max()
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return os.path.getsize(folder + "/m.bin"), float(error), [n["runtimePrecision"].astype(str) for n in nodes if n["layerType"].astype(str) == "FullyConnected"]
small, byte = product(ov.Type.u2, 2), product(ov.Type.u8, 8)
print("openvino", ov.__version__, "- bytes of the weights' file, largest error, type of the product: u2", small, "u8", byte)
assert small[2] == ["u2"] and small[1] < 1e-3 and small[0] < 0.27 * byte[0]
PY
