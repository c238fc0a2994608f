#!/usr/bin/env bash
# Guess: 4-bit weights that are cast to float and multiplied with a scale for each element are that product, as with any other type.
# What happens: MatMul with them is wrong by as much as its outputs, without an error. DequantizeLinear with blocks of the same scales is right.
# Seen: openvino 2026.4.1, 2026-11-30, CPU, INT4 and FLOAT4E2M1, float32 hint.
# Why it matters: expanding the scales of blocks is the obvious way around the import error for blocks that do not divide their axis.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnx, openvino as ov, ml_dtypes
from onnx import TensorProto as T, helper as h
def error(kind, blocks):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 34)).astype(ml_dtypes.float4_e2m1fn) if kind == T.FLOAT4E2M1 else rng.integers(-8, 8, (64, 34)).astype(np.int8)
    bits, s = w.view(np.uint8).reshape(-1) & 15, np.exp2(rng.integers(-3, 1, (2, 34))).astype(np.float32)
    x, each = rng.standard_normal((2, 64)).astype(np.float32), s.repeat(32, 0)
    constants = [onnx.TensorProto(name="w", data_type=kind, dims=w.shape, raw_data=(bits[0::2] | bits[1::2] << 4).tobytes()),
                 onnx.numpy_helper.from_array(s if blocks else each, "s")]
    nodes = [h.make_node("DequantizeLinear", ["w", "s"], ["r"], axis=0, block_size=32)] if blocks else [
        h.make_node("Cast", ["w"], ["f"], to=T.FLOAT), h.make_node("Mul", ["f", "s"], ["r"])]
    nodes.append(h.make_node("MatMul", ["x", "r"], ["y"]))
    g = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", T.FLOAT, [2, 64])], [h.make_tensor_value_info("y", T.FLOAT, [2, 34])], constants)
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 23)], ir_version=11); onnx.checker.check_model(m)
    core, options = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    y, want = core.compile_model(core.read_model(m.SerializeToString()), "CPU", options)(x)[0], x @ (w.astype(np.float32) * each)
    return float(np.abs(y - want).max() / np.abs(want).max())
found = {(name, blocks): error(getattr(T, name), blocks) for name in ("INT4", "FLOAT4E2M1") for blocks in (True, False)}
print("openvino", ov.__version__, "- largest error over the largest output, by type and whether DequantizeLinear has the blocks:", found)
assert all(value < 1e-5 if blocks else value > 0.1 for (_, blocks), value in found.items())
PY
