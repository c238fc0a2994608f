#!/usr/bin/env bash
# Guess: a Cast from float to INT4 does what ONNX's page on 4-bit integers says, round to the nearest with ties to even, in onnx's reference
#   at least; or it drops the fraction as a Cast to INT8 does.
# What happens: neither reads like the page. The reference drops the fraction (2.7 is 2), ONNX Runtime rounds ties away from zero (2.5 is 3,
#   0.5 is 1), while its Cast to INT8 drops the fraction. So 6.5 is 6 on the page and in the reference, 7 in ONNX Runtime; 2.7 is 3, 2, 3.
# Seen: onnxruntime 1.32.0, onnx 1.23.2, 2026-11-30, CPU.
# Why it matters: codes made by Div and Cast inside a graph are other codes on each side of a comparison; QuantizeLinear has ties to even in
#   both. 7.5 does not even saturate: it is -8 in ONNX Runtime and 7 in the reference.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as nh
from onnx.reference import ReferenceEvaluator
x = np.array([-2.7, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.7, 6.5], np.float32)
def both(kind, quantize=False):
    constants = [nh.from_array(np.float32(1), "s"), h.make_tensor("z", kind, [], [0])]
    first = h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]) if quantize else h.make_node("Cast", ["x"], ["q"], to=kind)
    ends = [h.make_tensor_value_info("x", T.FLOAT, x.shape)], [h.make_tensor_value_info("y", T.FLOAT, x.shape)]
    graph = h.make_graph([first, h.make_node("Cast", ["q"], ["y"], to=T.FLOAT)], "g", *ends, constants if quantize else [])
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    options = ort.SessionOptions(); options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(made.SerializeToString(), options).run(None, {"x": x})[0], ReferenceEvaluator(made).run(None, {"x": x})[0]
cut, even, away = np.trunc(x), np.rint(x), np.trunc(x + np.copysign(0.5, x))
print("onnxruntime", ort.__version__, "onnx", onnx.__version__, "- x:", x)
for name, (here, reference), wanted in (
    ("Cast to INT8", both(T.INT8), (cut, cut)),
    ("Cast to INT4", both(T.INT4), (away, cut)),
    ("QuantizeLinear to INT4, a step of 1", both(T.INT4, True), (even, even)),
):
    print(name, "- onnxruntime:", here, "reference:", reference)
    assert (here == wanted[0]).all() and (reference == wanted[1]).all(), "the behaviour has changed"
PY
