#!/usr/bin/env bash
# Guess: quantize_ with an int4 config makes int4 weights or raises; the configs of one library agree on what they do with a layer whose
#   inputs are no multiple of the group size.
# What happens: Int4WeightOnlyConfig leaves such a layer float, without an error or a warning (a message of level INFO that nobody sees): not even the rest
#   of the config is looked at (a packing format that does not exist passes). IntxWeightOnlyConfig and
#   Int8DynamicActivationIntxWeightConfig with the same type and groups raise AssertionError for the same layer.
# Seen: torchao 0.18.0, torch 2.13.0, 2026-11-30, CPU (the layer is left before any kernel is asked for).
# Why it matters: a model whose layers have 48 or 100 inputs is reported, stored and scored as int4 and is float32: its accuracy is
#   splendid. Whoever counts the bytes of the file sees it, whoever reads the metrics does not.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import logging, warnings
import torch, torchao
from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerGroup, quantize_
said = []
class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger().addHandler(Listener(level=logging.WARNING))
warnings.showwarning = lambda message, *rest: said.append(str(message))
def outcome(config):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(48, 64))
    before = net[0].weight.detach().clone()
    said.clear()
    try:
        quantize_(net, config)
    except AssertionError as error:
        return f"AssertionError: {error}"
    left = type(net[0].weight) is torch.nn.Parameter and net[0].weight.dtype == torch.float32 and torch.equal(net[0].weight, before)
    return "left float" if left else f"quantized: {type(net[0].weight).__name__}"
print("torchao", torchao.__version__, "torch", torch.__version__, "- Linear of 48 inputs, groups of 32")
first = outcome(Int4WeightOnlyConfig(group_size=32)), list(said)
print("Int4WeightOnlyConfig:", *first)
second = outcome(Int4WeightOnlyConfig(group_size=32, int4_packing_format="opaque")), list(said)
print("Int4WeightOnlyConfig with a packing format that it does not have:", *second)
others = [
    outcome(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    outcome(Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))),
]
print("IntxWeightOnlyConfig:", others[0], "\nInt8DynamicActivationIntxWeightConfig:", others[1])
assert first == second == ("left float", []), "the behaviour has changed"
assert all(other.startswith("AssertionError") for other in others), "the behaviour has changed"
PY
