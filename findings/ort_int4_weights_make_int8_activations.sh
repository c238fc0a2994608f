#!/usr/bin/env bash
# Guess: a file with INT4 weights and no QuantizeLinear rounds weights alone: its products are those of float activations with the
#   dequantized weights, however the weights lie in the file.
# What happens: with weights [K, N] the activations are rounded to int8, a scale for each 32 of them, for DequantizeLinear and
#   MatMul become a MatMulNBits of accuracy level 4. The same numbers as [N, K] with a Transpose (what exporters of torch write), or read by
#   a Gemm with transB, stay float. The option session.qdq_matmulnbits_accuracy_level = "1" keeps activations float.
# Seen: onnxruntime 1.32.0, 2026-11-30, CPU with AMX, and the same one emulated with AVX2 alone (QEMU, Haswell); INT4 and INT2.
# Why it matters: W4A16 is measured as W4A8, and which of two equal files is better is decided by the order of their axes. An outlier costs
#   the 31 values next to it most of their bits.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as nh
K, N, ROWS = 64, 32, 5
draw = np.random.default_rng(0)
q, s = draw.integers(-8, 8, (K, N)), (draw.random(N) + 0.5).astype(np.float32)
x = draw.standard_normal((ROWS, K)).astype(np.float32)
x[:, 5] = 300.0  # outliers of one channel, as transformers have them
y = x.astype(np.float64) @ (q * s.astype(np.float64))
def error(flipped, **settings):
    stored = q.T if flipped else q
    codes = (stored.reshape(-1, 2) & 15).astype(np.uint8)
    weight = T(name="q", data_type=T.INT4, dims=stored.shape, raw_data=(codes[:, 0] | codes[:, 1] << 4).tobytes())
    nodes = [h.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0 if flipped else 1)]
    nodes += [h.make_node("Transpose", ["w"], ["t"], perm=[1, 0])] if flipped else []
    nodes += [h.make_node("MatMul", ["x", "t" if flipped else "w"], ["y"])]
    ends = [h.make_tensor_value_info("x", T.FLOAT, [ROWS, K])], [h.make_tensor_value_info("y", T.FLOAT, [ROWS, N])]
    made = h.make_model(h.make_graph(nodes, "g", *ends, [weight, nh.from_array(s, "s")]), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    options = ort.SessionOptions()
    for key, value in settings.items():
        options.add_session_config_entry(f"session.{key}", value)
    return float(np.abs(ort.InferenceSession(made.SerializeToString(), options).run(None, {"x": x})[0] - y).max())
# By hand: activations in int8 steps of the largest value of each block along K over 127; the fusion takes 32 where scales are those of channels.
def by_hand(block):
    parts = x.astype(np.float64).reshape(ROWS, -1, block)
    step = np.abs(parts).max(-1, keepdims=True) / 127
    rounded = (np.round(parts / step) * step).reshape(ROWS, K)
    return float(np.abs(rounded @ (q * s.astype(np.float64)) - y).max())
plain, flipped, level = error(False), error(True), error(False, qdq_matmulnbits_accuracy_level="1")
print("onnxruntime", ort.__version__, "- largest error: weights [K, N]", plain, "[N, K] with Transpose", flipped, "[K, N] at accuracy level 1", level)
print("activations rounded by hand, in blocks of 32:", by_hand(32))
assert abs(plain - by_hand(32)) < 0.01 and max(flipped, level) < 0.01, "the behaviour has changed"
PY
