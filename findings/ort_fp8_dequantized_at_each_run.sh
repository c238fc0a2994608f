#!/usr/bin/env bash
# Guess: DequantizeLinear of a constant is computed once, when the file is loaded, as a Cast or Mul of constants is.
# What happens: Cast and Mul are folded into a float constant; DequantizeLinear of FP8 stays a node and is computed at every run.
# Seen: onnxruntime 1.32.0, 2026-11-30, CPU, default optimizations.
# Why it matters: with one row of input the product then takes ten times as long as with float weights; nothing is said.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnx, onnxruntime as ort, ml_dtypes, tempfile, collections
from onnx import TensorProto as T, helper as h
K, N = 64, 32
w = np.random.default_rng(0).standard_normal((K, N)).astype(ml_dtypes.float8_e4m3fn)
s = np.exp2(np.random.default_rng(1).integers(-3, 1, (K // 32, N))).astype(np.float32)
x = np.random.default_rng(2).standard_normal((2, K)).astype(np.float32)
def const(name, v, kind): return onnx.TensorProto(name=name, data_type=kind, dims=v.shape, raw_data=np.ascontiguousarray(v).tobytes())
def left(nodes, *more):
    g = h.make_graph(nodes + [h.make_node("MatMul", ["x", "r"], ["y"])], "g", [h.make_tensor_value_info("x", T.FLOAT, [2, K])],
                     [h.make_tensor_value_info("y", T.FLOAT, [2, N])], [const("w", w, T.FLOAT8E4M3FN), *more])
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    o = ort.SessionOptions(); o.log_severity_level = 3; o.optimized_model_filepath = tempfile.mkdtemp() + "/m.onnx"
    y = ort.InferenceSession(m.SerializeToString(), o, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.allclose(y, x @ (w.astype(np.float32) * s.repeat(32, 0)), atol=1e-4)
    return dict(collections.Counter(n.op_type for n in onnx.load(o.optimized_model_filepath).graph.node))
dequantized = left([h.make_node("DequantizeLinear", ["w", "s"], ["r"], axis=0, block_size=32)], const("s", s, T.FLOAT))
product = left([h.make_node("Cast", ["w"], ["f"], to=T.FLOAT), h.make_node("Mul", ["f", "e"], ["r"])], const("e", s.repeat(32, 0), T.FLOAT))
print("onnxruntime", ort.__version__, "- nodes left after loading:", dequantized, product)
assert dequantized == {"DequantizeLinear": 1, "MatMul": 1} and product == {"MatMul": 1}
PY
