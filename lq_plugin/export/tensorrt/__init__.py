"""ONNX files under TensorRT's rules for explicit quantization, and the linter that checks them.

TensorRT itself is not needed: files are checked against NVIDIA's documented rules, and their numbers by ONNX Runtime.
"""

from lq_plugin.export.tensorrt.lint import RULES as RULES, Finding as Finding, LintRule as LintRule, lint as lint
