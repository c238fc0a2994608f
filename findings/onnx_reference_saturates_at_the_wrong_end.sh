#!/usr/bin/env bash
# Guess: QuantizeLinear saturates: what is above the range becomes its largest number, in onnx's reference evaluator above all.
# What happens: the reference makes the smallest number of everything from 2^31 steps on (and of infinity): it casts to int32 before it clips.
#   4-bit, 8-bit and 16-bit types are the same; float8 types saturate rightly, as does ONNX Runtime for all of them. What is too small
#   becomes the smallest number in both.
# Seen: onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, 2026-11-30, x86-64.
# Why it matters: a runtime or an exporter that is checked against the reference is blamed for being right. Steps that small are those of a
#   channel that was switched off (1e-9 or an epsilon), whose input came back.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as nh
from onnx.reference import ReferenceEvaluator
x, step = np.array([0.5, 2.0, 3.0, -3.0, np.inf], np.float32), np.float32(1e-9)
def quantized(kind):
    initializers = [nh.from_array(step, "s"), h.make_tensor("z", kind, [], [0])]
    nodes = [h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), h.make_node("DequantizeLinear", ["q", "one", "z"], ["y"])]
    ends = [h.make_tensor_value_info("x", T.FLOAT, x.shape)], [h.make_tensor_value_info("y", T.FLOAT, x.shape)]
    made = h.make_model(h.make_graph(nodes, "g", *ends, [*initializers, nh.from_array(np.float32(1), "one")]), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return ReferenceEvaluator(made).run(None, {"x": x})[0], ort.InferenceSession(made.SerializeToString()).run(None, {"x": x})[0]
print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "- steps:", x / step)
for kind, low, high in ((T.INT4, -8, 7), (T.UINT4, 0, 15), (T.INT8, -128, 127), (T.UINT8, 0, 255), (T.INT16, -32768, 32767), (T.FLOAT8E4M3FN, -448, 448)):
    reference, here = quantized(kind)
    print(T.DataType.Name(kind), "reference", reference, "onnxruntime", here)
    top = high if kind == T.FLOAT8E4M3FN else low
    assert reference.tolist() == [high, high, top, low, top] and here.tolist() == [high, high, high, low, high], "the behaviour has changed"
PY
