#!/usr/bin/env bash
# Guess: in a QDQ file a float bias of a Conv or Gemm stays float, or is clipped to int32 where it does not fit.
# What happens: ONNX Runtime makes int32 of it in steps of input scale x weight scale and does not look whether it fits: where a channel's
#   weight scale is tiny (a pruned filter, a batch norm that has switched its channel off) the bias wraps around, without a word. An Add
#   after MatMul does not help (both become a Gemm), nor does a Sum after Gemm; a Sum after Conv or MatMul and an Add after Gemm do.
# Seen: onnxruntime 1.32.0, 2026-11-30, CPU, default optimizations (pass WeightBiasQuantization).
# Why it matters: exporters give all-zero channels an epsilon for a scale; their outputs are wrong by the whole range of the next activation.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper as h, numpy_helper as nh
SHAPES = {"Conv": [1, 8, 2, 2], "Gemm": [2, 8], "MatMul": [2, 8]}
def answer(kind, added, level):
    w = np.random.default_rng(0).integers(-127, 128, (4, 8)).astype(np.int8); w[3] = 0
    I = dict(w=w.reshape(4, 8, 1, 1) if kind == "Conv" else w.T.copy(), s=np.float32([.01, .01, .01, 1e-12]), xs=np.float32(.02), xz=np.uint8(128),
             ys=np.float32(.01), yz=np.uint8(128), b=np.float32([.5, -.5, .25, 1]))
    n = [h.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]), h.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
         h.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0 if kind == "Conv" else 1)]
    if added:
        if kind == "Conv": I["b"] = I["b"].reshape(1, 4, 1, 1)
        n += [h.make_node(kind, ["d", "wd"], ["p"]), h.make_node(added, ["p", "b"], ["c"])]
    else:
        n += [h.make_node(kind, ["d", "wd", "b"], ["c"])]
    n += [h.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"]), h.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"])]
    g = h.make_graph(n, "g", [h.make_tensor_value_info("x", TensorProto.FLOAT, SHAPES[kind])],
                     [h.make_tensor_value_info("y", TensorProto.FLOAT, None)], [nh.from_array(np.asarray(v), k) for k, v in I.items()])
    o = ort.SessionOptions(); o.log_severity_level = 3; o.graph_optimization_level = level
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    y = ort.InferenceSession(m.SerializeToString(), o, providers=["CPUExecutionProvider"]).run(None, {"x": np.full(SHAPES[kind], .02, np.float32)})[0]
    return round(float(np.moveaxis(y, 1 if kind == "Conv" else -1, 0)[3].ravel()[0]), 2)
print("onnxruntime", ort.__version__, "- a channel of zeros with scale 1e-12 and bias 1.0, as the file says and optimized")
L, wrong = ort.GraphOptimizationLevel, []
for kind, added in (("Conv", ""), ("Conv", "Sum"), ("Gemm", ""), ("Gemm", "Sum"), ("Gemm", "Add"), ("MatMul", "Add"), ("MatMul", "Sum")):
    says, gives = (answer(kind, added, level) for level in (L.ORT_DISABLE_ALL, L.ORT_ENABLE_ALL))
    print(f"{kind + (' + ' + added if added else ' with bias'):14} {says:5} {gives:5}")
    wrong += [(kind, added)] if says != gives else []
assert wrong == [("Conv", ""), ("Gemm", ""), ("Gemm", "Sum"), ("MatMul", "Add")], wrong
PY
