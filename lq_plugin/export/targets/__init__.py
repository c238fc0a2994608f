"""The library's own export targets, one file each; importing this registers them."""

from lq_plugin.export.targets import onnx as onnx, packed as packed, torchao as torchao, xnor as xnor
