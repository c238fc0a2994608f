"""Built-in export targets, one file each, registered on import."""

from lq_plugin.export.targets import (
    compressed_tensors as compressed_tensors,
    executorch as executorch,
    gguf as gguf,
    litert as litert,
    mlx as mlx,
    onnx as onnx,
    openvino as openvino,
    packed as packed,
    tensorrt as tensorrt,
    torchao as torchao,
    xnor as xnor,
)
