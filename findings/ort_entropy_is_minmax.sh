#!/usr/bin/env bash
# Guess: calibration by entropy clips outliers; that is what it is for.
# What happens: by default it makes as many bins as there are levels (128), so that no threshold but the extreme is tried: min-max.
#   With extra_options num_bins=2048 it clips.
# Seen: onnxruntime 1.32.0, 2026-11-30, calibrate_method=CalibrationMethod.Entropy.
# Why it matters: a comparison with "entropy calibration of ONNX Runtime" is one with min-max.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 sympy
"$folder/venv/bin/python" - <<'PY'
import numpy as np, onnx, onnxruntime as ort, tempfile
from onnx import TensorProto as T, helper as h
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator
x = np.random.default_rng(0).standard_normal((1, 100000)).astype(np.float32); x[0, 0] = 50.0
class Batches(CalibrationDataReader):
    def __init__(self): self.batches = iter([{"x": x}])
    def get_next(self): return next(self.batches, None)
g = h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g", [h.make_tensor_value_info("x", T.FLOAT, [1, 100000])], [h.make_tensor_value_info("y", T.FLOAT, [1, 100000])])
path = tempfile.mkdtemp() + "/m.onnx"
onnx.save(h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10), path)
def bound(method, **options):
    c = create_calibrator(path, ["Relu"], path + ".augmented.onnx", method, extra_options=options); c.collect_data(Batches())
    return float(np.asarray(c.compute_data().data["x"].range_value[1]).reshape(-1)[0])
minmax, entropy = bound(CalibrationMethod.MinMax), bound(CalibrationMethod.Entropy)
more = bound(CalibrationMethod.Entropy, num_bins=2048)
print("onnxruntime", ort.__version__, "- upper bound of a bell curve with one outlier at 50: min-max", minmax, "entropy", entropy, "entropy of 2048 bins", more)
assert minmax == 50 and entropy > 49 and more < 25
PY
