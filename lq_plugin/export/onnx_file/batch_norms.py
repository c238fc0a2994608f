"""Batch norms that follow convolutions in an ONNX graph."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lq_plugin.export.onnx_file.containers import Container
from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.onnx_file.queries import names_read


class Constants(Protocol):
    """Graph that takes constants; see `lq_plugin.export.onnx_file.graph.Graph`."""

    graph: onnx.GraphProto
    known: dict[str, onnx.TensorProto]
    form: Form

    def initializer(self, name: str, values: NDArray[Any], kind: int) -> str: ...


def absorb_batch_norm(graph: Constants, name: str, node: onnx.NodeProto, content: Container) -> Any:
    """Moves the shift of a following batch norm into the bias; returns its factors for the channels, or None.

    Args:
        graph: that the node is in; changed in place.
        name: of the layer.
        node: its convolution; None is returned of other operations.
        content: its weight.
    """
    if node.op_type != "Conv":
        return None
    followers = [other for other in graph.graph.node if node.output[0] in names_read(other)]
    given_out = any(value.name == node.output[0] for value in graph.graph.output)
    if len(followers) != 1 or followers[0].op_type != "BatchNormalization" or given_out:
        return None
    norm = followers[0]
    if any(value not in graph.known for value in norm.input[1:5]):
        return None
    weight, shift, mean, variance = (
        numpy_helper.to_array(graph.known[value]).astype(np.float64) for value in norm.input[1:5]
    )
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    factor = weight / np.sqrt(variance + epsilon)
    if content.zero_point is not None and not factor.all():
        return None
    # The only integers without a negative.
    lowest = (content.q.flatten(1).amin(1) == -(1 << (content.bits - 1))).numpy()
    if not graph.form.negative_scales and content.bits == 8 and (lowest & (factor < 0)).any():
        return None
    bias = numpy_helper.to_array(graph.known[node.input[2]]).astype(np.float64) if len(node.input) == 3 else 0.0
    moved = graph.initializer(
        f"{name}.bias_folded", ((bias - mean) * factor + shift).astype(np.float32), TensorProto.FLOAT
    )
    del node.input[2:]
    node.input.append(moved)
    # Under the norm's name, which other nodes read and which may be an output of the graph.
    node.output[0] = norm.output[0]
    graph.graph.node.remove(norm)
    return torch.from_numpy(factor.astype(np.float32))
