#!/usr/bin/env bash
# Guess: ONNX Runtime leaves out a Relu in front of a QuantizeLinear where the lowest number of the quantized type stands for 0, as
# with unsigned bytes and zero point 0, and nowhere else.
# What happens: also where the type is FLOAT8E4M3FN or FLOAT8E5M2, whose lowest number is far below 0. With the default optimizations
# negative values go through, without a warning; with optimizations off, or with unsigned bytes, or with a Clip from 0 on in place of
# the Relu, results are right. A Reshape between the two changes nothing.
# Seen: onnxruntime 1.32.0, 2026-12-01, CPU.
# Why it matters: a network whose activations are FP8 gets along without its ReLUs, and only its accuracy says so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.22.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto as T, helper, numpy_helper as nh
x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(2, 32)
def lowest(kind, first, between, optimized):
    constants = [nh.from_array(np.float32(4 / 255), "s"), helper.make_tensor("z", kind, [], [0]), nh.from_array(np.float32(0), "zero"),
                 nh.from_array(np.array([32, 2]), "shape")]
    nodes = [helper.make_node(first, ["x"] + ["zero"] * (first == "Clip"), ["a"])]
    nodes += [helper.make_node("Reshape", ["a", "shape"], ["b"])] * between
    nodes += [helper.make_node("QuantizeLinear", ["b" if between else "a", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", T.FLOAT, [2, 32])], [helper.make_tensor_value_info("y", T.FLOAT, None)], constants)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return float(ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0].min())
found = {(name, first, between, optimized): lowest(kind, first, between, optimized)
         for name, kind in (("float8e4m3fn", T.FLOAT8E4M3FN), ("float8e5m2", T.FLOAT8E5M2), ("uint8", T.UINT8))
         for first in ("Relu", "Clip") for between in (False, True) for optimized in (False, True)}
print("onnxruntime", ort.__version__)
for (name, first, between, optimized), value in found.items():
    print(f"{name}: {first}{', Reshape' if between else ''}, {'default' if optimized else 'no'} optimizations: lowest value {value:.3f}")
for (name, first, _, optimized), value in found.items():
    assert (value < -1) == (name != "uint8" and first == "Relu" and optimized), (name, first, optimized, value)
PY
