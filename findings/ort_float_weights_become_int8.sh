#!/usr/bin/env bash
# Guess: what a QDQ file leaves float stays float: a Conv with float weights between quantized activations computes in float.
# What happens: ONNX Runtime makes int8 of the float weights, one scale for the tensor, where the input is dequantized and the result
#   quantized; channels of small weights are rounded to nothing. A bias as a following Add (it becomes a part of the Conv) changes nothing.
# Seen: onnxruntime 1.32.0, 2026-11-30, CPU, default optimizations (pass WeightBiasQuantization).
# Why it matters: the one sensitive layer that was kept float on purpose, and codebook weights (Gather from a table), are rounded after all.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper as h, numpy_helper as nh
def session(added, **options):
    w = np.random.default_rng(0).standard_normal((4, 8, 1, 1)).astype(np.float32) * np.float32([1, 1, 1, .001]).reshape(4, 1, 1, 1)
    I = dict(w=w, xs=np.float32(.02), xz=np.uint8(128), ys=np.float32(1e-4), yz=np.uint16(32768), b=np.zeros((1, 4, 1, 1), np.float32))
    n = [h.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]), h.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
         h.make_node("Conv", ["d", "w"], ["p" if added else "c"])]
    if added: n.append(h.make_node(added, ["p", "b"], ["c"]))
    n += [h.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"]), h.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"])]
    g = h.make_graph(n, "g", [h.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 4, 4])],
                     [h.make_tensor_value_info("y", TensorProto.FLOAT, None)], [nh.from_array(np.asarray(v), k) for k, v in I.items()])
    o = ort.SessionOptions(); o.log_severity_level = 3
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(m.SerializeToString(), o, providers=["CPUExecutionProvider"], **options)
x = {"x": np.random.default_rng(1).standard_normal((1, 8, 4, 4)).astype(np.float32)}
small = lambda s: float(np.abs(s.run(None, x)[0][:, 3]).max())
print("onnxruntime", ort.__version__, "- largest output of a channel whose float weights are 1/1000 of the others'")
kept, found = small(session("", disabled_optimizers=["WeightBiasQuantization"])), {name: small(session(name)) for name in ("", "Add", "Sum")}
print("pass off  ", kept)
for name, value in found.items(): print(f"{name or 'no bias':10}", value)
assert kept > 0 and found[""] == found["Add"] == 0 and abs(found["Sum"] - kept) < 1e-6, found
PY
