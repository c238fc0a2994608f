"""Built-in export targets, one file each, registered on import."""

from lq_plugin.export.targets import (
    compressed_tensors as compressed_tensors,
    gguf as gguf,
    mlx as mlx,
    onnx as onnx,
    packed as packed,
    tensorrt as tensorrt,
    torchao as torchao,
    xnor as xnor,
)
