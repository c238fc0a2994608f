#!/usr/bin/env bash
# Guess: torch.onnx.export of an nn.LSTM with proj_size writes the projection as products of its own, or refuses, because ONNX's LSTM has
#   no projection.
# What happens: torch exports an ONNX LSTM without it, without a word. weight_hr_l0 is not in the file, the weights are those of a
#   projected LSTM, and onnx.checker with full_check finds nothing where the model returns the output alone (with the states also it finds
#   two shapes). ONNX Runtime loads the file and refuses the first run.
# Seen: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, 2026-11-30, CPU.
# Why it matters: a model that was exported and checked fails on the device. The same LSTM step by step in Python exports rightly.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/lstm.onnx" <<'PY'
import sys, warnings
import numpy as np, onnx, onnxruntime, onnxscript, torch
warnings.simplefilter("ignore")
lstm = torch.nn.LSTM(16, 6, batch_first=True, proj_size=4).eval()
class Output(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm
    def forward(self, x):
        return self.lstm(x)[0]
x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
print("torch", torch.__version__, "onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
torch.onnx.export(Output().eval(), (x,), sys.argv[1], dynamo=True, verbose=False)
file = onnx.load(sys.argv[1])
onnx.checker.check_model(file, full_check=True)
kinds = sorted(node.op_type for node in file.graph.node)
projection = lstm.weight_hr_l0.detach().numpy()
held = any(
    tensor.dims and sorted(tensor.dims)[-2:] == [4, 6] and np.isin(projection, onnx.numpy_helper.to_array(tensor)).all()
    for tensor in file.graph.initializer
)
print("nodes:", kinds, "| the projection is in the file:", held)
try:
    onnxruntime.InferenceSession(sys.argv[1]).run(None, {file.graph.input[0].name: x.numpy()})
    ran = True
except Exception as error:
    ran = False
    print("ONNX Runtime:", str(error)[:160])
sys.exit(0 if "LSTM" in kinds and not held and not ran else "the behaviour has changed")
PY
