#!/usr/bin/env bash
# Guess: averaging the weights of a quantized model (SWA, AveragedModel with use_buffers=True, which Lightning's WeightAveraging asks for)
#   averages scales and zero points alike: a zero point that moves from 64 to 192 is about 128 on average.
# What happens: the running mean of an integer buffer is rounded toward zero at every update. One that climbs by less than 1 an update
#   stays where it was when averaging began; one that falls follows to its end. The scale next to it is
#   averaged as a float, so that the pair belongs to no range the layer ever had. There is no warning.
# Seen: torch 2.13.0, 2026-11-30, CPU, torch.ao's own FakeQuantize.
# Why it matters: the averaged model of a QAT run clips the activations that its weights were trained for. use_buffers=False leaves
#   the ranges of the first model; averaging floats (x_min, x_max) and computing the zero point from them is right.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.ao.quantization import FakeQuantize, MinMaxObserver
from torch.optim.swa_utils import AveragedModel
STEPS = 201
def averaged(start, end):
    """The range of a layer's inputs moves: [-1, 3], zero point 64, to [-3, 1], zero point 191, or back, with the width unchanged."""
    model = torch.nn.Sequential(FakeQuantize(observer=MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8))
    average, seen = AveragedModel(model, use_buffers=True), []
    for step in range(STEPS):
        low = start + (end - start) * step / (STEPS - 1)
        model[0].activation_post_process.reset_min_max_vals()
        model(torch.tensor([low, low + 4]))
        seen.append((model[0].scale.item(), model[0].zero_point.item()))
        average.update_parameters(model)
    mean = [sum(values) / STEPS for values in zip(*seen)]
    return seen[0][1], seen[-1][1], mean, average.module[0].scale.item(), average.module[0].zero_point.item(), average.module.eval()
print("torch", torch.__version__)
for start, end in ((-1, -3), (-3, -1)):
    first, last, (mean_scale, mean_zero), scale, zero, net = averaged(start, end)
    net[0].disable_observer()
    print(f"zero point from {first} to {last}: mean {mean_zero:.1f}, averaged model {zero}; scale: mean {mean_scale:.5f}, averaged model {scale:.5f};",
          "the middle range's ends, [-2, 2], become", [round(value, 3) for value in net(torch.tensor([-2.0, 2.0])).tolist()])
    assert abs(scale - mean_scale) < 1e-5 and abs(mean_zero - 127.5) < 1, "not the ranges of the example"
    assert abs(zero - (first if first < last else last)) <= 2, "the behaviour has changed"
PY
