#!/usr/bin/env bash
# Guess: numpy sums narrow numbers in wide ones, as it does for its own: int8 in int64, the mean of float16 in float32.
# What happens: the types of ml_dtypes are added in their own four or eight bits. The sum of ten int4 ones is -6, the mean of a thousand
#   float8_e4m3fn ones is 0.0156 (the sum stops at 16, where one more is less than half a step). dot is of four bits and matmul of
#   eight: ten sevens times ten sevens are -6 in one and -22 in the other, not 490. astype first, or dtype=, is right.
# Seen: ml_dtypes 0.6.0, numpy 2.4.6, 2026-11-30.
# Why it matters: onnx.numpy_helper.to_array gives these types for INT4 and FLOAT8 tensors. A bias correction, a mean code, the sum of weights
#   that belongs to a zero point, or the share of zeros of a tensor is wrong without a warning.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes, numpy as np
print("ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__)
ten, sevens = np.ones(10, ml_dtypes.int4), np.full(10, 7, ml_dtypes.int4)
seen = {
    "sum of ten int8 ones": int(np.ones(10, np.int8).sum()),
    "sum of ten int4 ones": int(ten.sum()),
    "int4 with dtype=int32": int(ten.sum(dtype=np.int32)),
    "dot of ten sevens": int(np.dot(sevens, sevens)),
    "matmul of ten sevens": int((sevens[None] @ sevens[:, None]).astype(np.int64)[0, 0]),
}
means = {np.dtype(kind).name: float(np.ones(1000, kind).mean()) for kind in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)}
means["float8_e4m3fn with dtype=float32"] = float(np.ones(1000, ml_dtypes.float8_e4m3fn).mean(dtype=np.float32))
for what, value in seen.items():
    print(f"{what}: {value}")
for what, value in means.items():
    print(f"mean of a thousand ones of {what}: {value}")
assert list(seen.values()) == [10, -6, 10, -6, -22], "the behaviour has changed"
assert list(means.values()) == [1.0, 0.255859375, 0.015625, 1.0], "the behaviour has changed"
PY
