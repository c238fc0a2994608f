"""`from lq_plugin import QAT` loads little on top of torch and lightning, and nothing that takes long."""

from __future__ import annotations

import json
import subprocess
import sys

#: What is imported by what needs it alone: packages of extras, and modules whose import does work.
LATER = (
    "lq_plugin.native.operators",
    "lq_plugin.native.triton_kernels",
    "torch._inductor.compile_fx",
    "torch.onnx._internal",
    "torchao",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "transformers",
    "scipy",
    "sklearn",
    "matplotlib",
    "pandas",
    "optuna",
    "ray",
    "wandb",
    "torchvision",
    "timm",
)
_PROGRAM = """
import json, sys
import torch, lightning, torchmetrics
before = set(sys.modules)
from lq_plugin import QAT
QAT("w8a8")
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_modules_that_an_import_must_not_load() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "lq_plugin.callbacks.qat" in loaded
    assert [name for name in loaded if any(name == late or name.startswith(f"{late}.") for late in LATER)] == []
    # Whoever adds a package here says why it is worth its time at every start.
    assert {name.partition(".")[0] for name in loaded} <= {"lq_plugin", "safetensors"}
