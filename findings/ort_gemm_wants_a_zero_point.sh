#!/usr/bin/env bash
# Guess: DequantizeLinear without a zero point is the same as one with zeros, as ONNX says, so that a Gemm next to a quantized input is the
#   same integer kernel.
# What happens: a Gemm is a QGemm only where its weight's zero point is written, and its bias is int32 or none. Without it the
#   weight is dequantized at every run and the product is float; a MatMul in its place is an integer kernel either way. The numbers agree.
# Seen: onnxruntime 1.32.0, 2026-12-01, AMD EPYC with AVX-512 and VNNI.
# Why it matters: exporters write symmetric int8 weights without zero points, and linear layers on [N, C] as Gemm: such a layer is
#   tens of times slower than the integers that it was quantized for, and nothing says so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import statistics, sys, time
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as nh
N, ROWS = 1024, 4
draw = np.random.default_rng(0)
q, b = draw.integers(-127, 128, (N, N)).astype(np.int8), draw.standard_normal(N).astype(np.float32)
x = draw.standard_normal((ROWS, N)).astype(np.float32)
def run(kind, zero_point, bias):
    held = {"xs": np.float32(0.03), "xz": np.uint8(128), "q": q, "s": np.full(N, 0.01, np.float32)}
    weight, inputs = ["q", "s"], ["d", "w"]
    if zero_point:
        held["z"] = np.zeros(N, np.int8)
        weight.append("z")
    if bias:
        held["b"] = b
        inputs.append("b")
    nodes = [
        h.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]), h.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["d"]),
        h.make_node("DequantizeLinear", weight, ["w"], axis=1), h.make_node(kind, inputs, ["y"]),
    ]
    ends = [h.make_tensor_value_info("x", T.FLOAT, [ROWS, N])], [h.make_tensor_value_info("y", T.FLOAT, [ROWS, N])]
    graph = h.make_graph(nodes, "g", *ends, [nh.from_array(np.asarray(value), name) for name, value in held.items()])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = sys.argv[1] + "/optimized.onnx"
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    times = []
    for _ in range(30):
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return kinds, y - (b if bias else 0), 1e3 * statistics.median(times)
print("onnxruntime", ort.__version__)
found = {}
for case in (("Gemm", False, False), ("Gemm", True, False), ("Gemm", True, True), ("MatMul", False, False)):
    found[case] = run(*case)
    print(f"{case[0]:6} zero point {str(case[1]):5} float bias {str(case[2]):5}: {found[case][2]:.3f} ms", " ".join(found[case][0]))
kinds = {case: any(kind in ("QGemm", "MatMulIntegerToFloat") for kind in value[0]) for case, value in found.items()}
assert list(kinds.values()) == [False, True, False, True], kinds
reference = found["MatMul", False, False][1]
assert all(np.allclose(value[1], reference, rtol=1e-4, atol=1e-3) for value in found.values())
PY
