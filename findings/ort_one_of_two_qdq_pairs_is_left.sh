#!/usr/bin/env bash
# Guess: two QuantizeLinear/DequantizeLinear pairs in a row round twice, or the finer one is dropped as the one that changes nothing.
# What happens: ONNX Runtime leaves one pair, that with the finer step, and the coarse rounding that the file asks for is lost. It is so at
#   every level of optimization but "disabled". A Relu between the pairs keeps both.
# Seen: onnxruntime 1.32.0, 2026-11-30, CPU.
# Why it matters: a layer whose output is quantized to 4 bits (steps of 0.5 here), read by a layer whose input is quantized to 8 bits,
#   computes with 8 bits: the file is better than the device that will run it, and no metric shows it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper as h, numpy_helper as nh
LEVELS = {name: getattr(ort.GraphOptimizationLevel, f"ORT_{name}") for name in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")}
def largest_difference(steps, between, level):
    # What the file says, in numpy: round to the first step, then to the second; nothing is clipped.
    x = np.linspace(-3, 3, 601, dtype=np.float32)
    wanted = x
    for i, step in enumerate(steps):
        wanted = np.round(wanted / np.float32(step)).astype(np.float32) * np.float32(step)
        wanted = np.maximum(wanted, 0) if between and i == 0 else wanted
    constants, nodes, last = [], [], "x"
    for i, step in enumerate(steps):
        constants += [nh.from_array(np.float32(step), f"s{i}"), nh.from_array(np.uint8(128), f"z{i}")]
        nodes += [h.make_node("QuantizeLinear", [last, f"s{i}", f"z{i}"], [f"q{i}"]), h.make_node("DequantizeLinear", [f"q{i}", f"s{i}", f"z{i}"], [f"d{i}"])]
        last = f"d{i}"
        if between and i == 0:
            nodes.append(h.make_node("Relu", [last], ["r"])); last = "r"
    nodes.append(h.make_node("Mul", [last, "one"], ["y"])); constants.append(nh.from_array(np.float32([1.0]), "one"))
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", TensorProto.FLOAT, [601])], [h.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants)
    options = ort.SessionOptions(); options.log_severity_level = 3; options.graph_optimization_level = level
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    got = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return round(float(np.abs(got - wanted).max()), 4)
print("onnxruntime", ort.__version__, "- largest difference from the file as written, steps of the two pairs")
found = {}
for steps in ((0.5, 0.05), (0.05, 0.5)):
    for between in (False, True):
        found[steps, between] = [largest_difference(steps, between, level) for level in LEVELS.values()]
        print(steps, "Relu between" if between else "in a row    ", dict(zip(LEVELS, found[steps, between])))
for steps in ((0.5, 0.05), (0.05, 0.5)):
    exact, *optimized = found[steps, False]
    assert exact < 1e-6 and all(difference > 0.2 for difference in optimized), "the pairs in a row behave otherwise now"
    assert all(difference < 1e-6 for difference in found[steps, True]), "the pairs around a Relu behave otherwise now"
PY
