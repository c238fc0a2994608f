#!/usr/bin/env bash
# Guess: an INT2 weight that is dequantized and transposed loads like an INT4 one; the smaller constant is no harder.
# What happens: ONNX Runtime refuses the file ("Element type mismatch between tensor proto and ortvalue_initializer" from constant folding)
#   from 128 bytes of packed INT2 or UINT2 data on, where the DequantizeLinear has a zero point. Smaller constants and INT4 of any size load.
# Seen: onnxruntime 1.32.0, 2026-11-30, CPU.
# Why it matters: every nn.Linear is exported as DequantizeLinear, Transpose, MatMul: a 2-bit model loads while it is a toy.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto, helper as h, numpy_helper as nh
def loads(kind, rows, bits):
    per_byte, columns = 8 // bits, 16
    packed = bytes(rows * columns // per_byte)
    weight = h.make_tensor("w", getattr(TensorProto, kind), [rows, columns], packed, raw=True)
    zeros = h.make_tensor("z", getattr(TensorProto, kind), [rows], bytes(-(-rows // per_byte)), raw=True)
    nodes = [h.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0), h.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
             h.make_node("MatMul", ["x", "t"], ["y"])]
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", TensorProto.FLOAT, [3, columns])], [h.make_tensor_value_info("y", TensorProto.FLOAT, [3, rows])],
                         [weight, zeros, nh.from_array(np.ones(rows, np.float32), "s")])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 25)], ir_version=13)
    onnx.checker.check_model(model)
    options = ort.SessionOptions(); options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return len(packed), str(error).strip().splitlines()[-1][-90:]
    session.run(None, {"x": np.ones((3, columns), np.float32)})
    return len(packed), "loads and runs"
print("onnxruntime", ort.__version__)
found = {}
for kind, bits in (("INT2", 2), ("UINT2", 2), ("INT4", 4), ("UINT4", 4)):
    for rows in (4, 8, 16, 28, 32, 64):
        size, outcome = loads(kind, rows, bits)
        found[kind, size] = outcome
        print(f"{kind:6} {size:4} bytes: {outcome}")
for (kind, size), outcome in found.items():
    fails = kind in ("INT2", "UINT2") and size >= 128
    assert (outcome != "loads and runs") == fails, f"{kind} of {size} bytes behaves otherwise now: {outcome}"
PY
