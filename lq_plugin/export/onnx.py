"""One ONNX file in the standard QDQ form, which ONNX Runtime, OpenVINO and TensorRT read.

The float model is exported by `torch.onnx.export`, and then gets its quantization back: each quantized weight becomes
whole numbers and a DequantizeLinear (or a Gather from its table), each quantized activation a QuantizeLinear and a
DequantizeLinear. Batch norms after a quantized convolution move into its scales and bias; a negative factor changes the
sign of the channel's whole numbers, or of its scale where their type lacks the negative of one of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.checks import check_float32, check_folder, check_unchanged
from lq_plugin.export.codes import encode
from lq_plugin.export.containers import Container, container, refusal
from lq_plugin.export.graph import Graph
from lq_plugin.export.operations import operation_nodes
from lq_plugin.export.quiet import quiet
from lq_plugin.export.sums import quantize_sums
from lq_plugin.export_options import smallest_faults
from lq_plugin.layers import CompoundWeight, QuantizedLayer, computed_faults, weight_key
from lq_plugin.model.operations import QuantizedOperation, operations_of, quantized_operations
from lq_plugin.model.prepare import quantized_layers, quantizers, remove
from lq_plugin.model.record import record
from lq_plugin.quantizers import InputQuantizer
from lq_plugin.spec import PerChannel, PerGroup

log = logging.getLogger(__name__)

#: The first one with 4-bit types and blocks of scales.
OPSET = 21


def export_onnx(
    model: nn.Module,
    inputs: Sequence[Any],
    path: str | Path,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    sums_from: Iterable[Any] | None = None,
    smallest: int = 2,
    exported: onnx.ModelProto | None = None,
) -> int:
    """Write a prepared and calibrated model as ONNX.

    Args:
        model: prepared; it is not changed.
        inputs: positional arguments of its forward, as an example; at least two samples where the batch is dynamic.
        path: of the file.
        dynamic_batch: dim 0 of every input may have any size.
        input_names, output_names: of the graph; as many names as `inputs` has tensors.
        sums_from: calibration batches, each a tensor or a tuple like `inputs`, without targets. With them residual sums between
            convolutions are rounded to 8 bits too, which keeps runtimes in whole numbers (`lq_plugin.export.sums`). None: the file rounds
            nothing but what the plan says.
        smallest: bits of the smallest integer type for weights: 2, 4 (OpenVINO has no INT2, and opset 21 does), or 8.
        exported: the float model's graph, where `float_graph` has made it before for the same inputs: that takes most of the time.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: another precision than float32, no such folder, names or batches that do not fit; or listing every tensor that
            ONNX cannot say exactly. No file is written then.
        MissingPackageError: without the packages onnx and onnxscript (`pip install "lq_plugin[onnx]"`).
    """
    raise_all(ExportError, "cannot export the model", smallest_faults(smallest))
    check_folder(path)
    check_unchanged(model)
    check_float32(model)
    batches = None if sums_from is None else list(sums_from)
    _check_inputs(inputs, input_names, batches, dynamic_batch)
    layers = quantized_layers(model)
    if not layers:
        raise ExportError(f"{type(model).__name__} is not quantized: prepare and calibrate it, or load its checkpoint, first")
    missing = [f"{q.name} ({q.spec}) has no range" for q in quantizers(model) if q.needs_calibration and not q.is_calibrated]
    raise_all(ExportError, "cannot export the model", missing + computed_faults(layers))
    weights, activations = _collect(layers)
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(x, Tensor) and x.ndim else None for x in inputs) if dynamic_batch else None
    plain = float_copy(model)
    plain_graph = copy.deepcopy(exported) if exported is not None else float_graph(plain, tuple(inputs), shapes, input_names, output_names)
    graph = Graph(plain_graph, smallest)
    operations = quantized_operations(model)
    # Before the graph changes. What the float model does is what the exporter has seen.
    recorded = operations_of(record(plain, lambda: plain(*inputs))) if operations else {}
    nodes_of = operation_nodes(graph.model, recorded.values())
    faults: list[str] = []
    readers: dict[str, list[onnx.NodeProto]] = {}
    tied = _tied(plain)
    for name, layer in layers:
        key = weight_key(name, layer)
        try:
            source = _initializer_of(key, tied.get(key, []), graph)
            if isinstance(layer, CompoundWeight):
                readers[name] = graph.products_of(source)
                if name in weights:
                    graph.put_parameter(name, source, weights[name])
            else:
                readers[name], transposed = graph.consumers(source, layer)
                if name in weights:
                    graph.put_weight(name, source, readers[name], _oriented(weights[name], layer, name), transposed)
        except ExportError as error:
            faults.append(str(error))
    # Behind all weights, which take batch norms out of the graph.
    for name in activations.keys() & readers.keys():
        scale, *rest = _activation(activations[name])
        for node in readers[name]:
            graph.put_activation(node, scale, *rest)
            graph.put_bias(name, node, scale)
    faults += _put_operations(graph, operations, nodes_of)
    raise_all(ExportError, "cannot export the model", faults)
    file = graph.finish()
    if batches is not None and not quantize_sums(file, (_feed(file, batch) for batch in batches)):
        log.warning("%s: sums_from has no effect, no sum in the graph reads a convolution of whole numbers", path)
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, path)
    return Path(path).stat().st_size


def _check_inputs(inputs: Sequence[Any], input_names: Sequence[str] | None, batches: list[Any] | None, dynamic_batch: bool) -> None:
    """Refuse names and calibration batches that do not fit the example.

    Raises:
        ExportError: naming every fault.
    """
    if isinstance(inputs, (Tensor, str)) or not isinstance(inputs, Sequence):
        raise ExportError(f"inputs are the positional arguments of the model's forward, got a {type(inputs).__name__}: write (x,)")
    examples = _tensors(inputs)
    faults = []
    if input_names is not None and (isinstance(input_names, str) or len(input_names) != len(examples)):
        faults.append(f"input_names are {len(examples)}, as many as there are tensors in inputs, got {input_names!r}")
    if isinstance(batches, list) and not batches:
        faults.append("sums_from: the ranges of residual sums need calibration data, there were no batches")
    for index, batch in enumerate(batches or ()):
        faults += [f"sums_from: batch {index} {fault}" for fault in _batch_faults(batch, examples, dynamic_batch)]
    raise_all(ExportError, "cannot export the model", faults)


def _batch_faults(batch: Any, examples: Sequence[Tensor], dynamic_batch: bool) -> Iterator[str]:
    """How a calibration batch differs from the example's tensors in more than its number of samples."""
    if not isinstance(batch, (Tensor, tuple, list)):
        yield f"is a tensor or a tuple like inputs, got {type(batch).__name__}"
        return
    values = _tensors(batch)
    if len(values) != len(examples):
        yield f"has {len(values)} tensors, the model has {len(examples)} inputs; targets do not belong in it: of (x, y) give x"
        return
    for number, (x, example) in enumerate(zip(values, examples, strict=True)):
        free = 1 if dynamic_batch else 0
        if x.dtype != example.dtype or x.ndim != example.ndim or x.shape[free:] != example.shape[free:]:
            wanted = f"{example.dtype} of shape {list(example.shape)}"
            yield f"has {x.dtype} of shape {list(x.shape)} as input {number}, the example has {wanted}"


def _tensors(value: Any) -> list[Tensor]:
    """Tensors of nested arguments, in the order of the graph's inputs; numbers and None are constants there."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _feed(file: onnx.ModelProto, batch: Any) -> dict[str, Any]:
    """A batch as arrays by input name."""
    return {value.name: x.detach().cpu().numpy() for value, x in zip(file.graph.input, _tensors(batch), strict=True)}


def knowable_faults(model: nn.Module) -> list[str]:
    """What of a prepared model's last stage ONNX cannot hold whatever its weights will be; calibrated or not."""
    faults: list[str] = []
    for name, layer in quantized_layers(model):
        # Its shape, not the weight's, which a strategy may hold in shards.
        weight = cast(Any, layer.weight_quantizer)
        if weight is not None and (reason := refusal(weight.spec, weight.shape[0])) is not None:
            faults.append(f"{name}.weight ({weight.spec}): {reason}")
        faults += _slot_faults(name, layer)
    operands = [quantizer for _, operation in quantized_operations(model) for quantizer in operation.quantizers()]
    return faults + [reason for quantizer in operands if (reason := _no_fixed_scale(quantizer)) is not None]


def _slot_faults(name: str, layer: QuantizedLayer) -> list[str]:
    """What ONNX cannot say of a layer's input and output."""
    faults = []
    if layer.output_quantizer is not None:
        faults.append(f"{name}.output: quantized outputs have no place in the file yet; quantize the input of the next layer")
    if layer.input_quantizer is not None and (reason := _no_fixed_scale(layer.input_quantizer)) is not None:
        faults.append(reason)
    return faults


def _collect(layers: Sequence[tuple[str, QuantizedLayer]]) -> tuple[dict[str, Container], dict[str, InputQuantizer]]:
    weights: dict[str, Container] = {}
    activations: dict[str, InputQuantizer] = {}
    faults: list[str] = []
    for name, layer in layers:
        if layer.weight_quantizer is not None:
            quantizer = cast(Any, layer.weight_quantizer).current
            try:
                if quantizer is None:
                    raise ExportError(f"{name}.weight is float at this stage of its plan")
                weights[name] = container(quantizer.spec, encode(quantizer, layer.canonical(layer.weight)), f"{name}.weight")
            except ExportError as error:
                faults.append(str(error))
        faults += _slot_faults(name, layer)
        if (found := layer.input_quantizer) is not None:
            activations[name] = found
    raise_all(ExportError, "cannot export the model", faults)
    return weights, activations


def _put_operations(
    graph: Graph, operations: Iterable[tuple[str, QuantizedOperation]], nodes: Mapping[str, onnx.NodeProto]
) -> Iterator[str]:
    """Quantize the operands of operations; what cannot be said, as text."""
    for name, operation in operations:
        if name not in nodes:
            yield f"{name}: the exported graph has no one node for this {operation.operation.op}, leave it float"
            continue
        for index, quantizer in zip(operation.operation.operands, operation.quantizers(), strict=True):
            current: Any = quantizer.current
            if current is None:
                yield f"{quantizer.name} is float at this stage of its plan"
            elif (reason := _no_fixed_scale(quantizer)) is not None:
                yield reason
            else:
                graph.put_activation(nodes[name], *_activation(current), operand=index)


def _no_fixed_scale(quantizer: InputQuantizer) -> str | None:
    if quantizer.spec.format_name == "int" and not isinstance(quantizer.spec.granularity, PerGroup):
        return None
    return f"{quantizer.name} ({quantizer.spec}): its scales are found at run time, QuantizeLinear needs them fixed"


def _tied(plain: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """For the key of each parameter: all keys of the same parameter, and the modules that hold it."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in plain.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(name, recurse=False):
            holders.setdefault(id(parameter), []).append((key, module))
    return {key: found for found in holders.values() for key, _ in found}


def _initializer_of(key: str, tied: Sequence[tuple[str, nn.Module]], graph: Graph) -> str:
    """What the graph calls a weight: of the keys of a tied one it knows the one that the exporter met first.

    Raises:
        ExportError: several modules that compute alike have it, and the graph does not say which of its nodes is whose.
    """
    for looks_up in (True, False):
        if len({id(module) for _, module in tied if isinstance(module, nn.Embedding) == looks_up}) > 1:
            names = ", ".join(name for name, _ in tied)
            raise ExportError(f"{names} are one parameter, and the graph does not say which node is whose; an embedding and a head may be")
    return next((name for name, _ in tied if name in graph.known), key)


def _oriented(content: Container, layer: QuantizedLayer, name: str) -> tuple[Container, bool]:
    """The container, and whether the layer keeps its weight with dims 0 and 1 exchanged."""
    probe = torch.arange(content.q.numel()).reshape(content.q.shape)
    held = layer.from_canonical(probe)
    if torch.equal(held, probe):
        return content, False
    if held.shape == probe.transpose(0, 1).shape and torch.equal(held, probe.transpose(0, 1)):
        return content, True
    raise ExportError(f"{name}: a transposed convolution with groups holds its channels along no single axis of ONNX")


def _activation(quantizer: InputQuantizer) -> tuple[Tensor, Tensor, Any, int | None]:
    """Scale and zero point as ONNX has them, the grid, and the axis of per-channel ones."""
    scale, zero_point = (value.detach().float() for value in quantizer.qparams())
    axis = quantizer.axis if isinstance(quantizer.spec.granularity, PerChannel) else None
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return scale, zero_point, quantizer.spec.grid, axis


def float_graph(
    plain: nn.Module,
    inputs: tuple[Any, ...],
    shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """A float model as an ONNX graph whose initializers keep the names of the parameters."""
    # They tell of every step on the console, and warn of packages that could be installed.
    with quiet("torch.onnx", "onnx_ir", "onnxscript"), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            plain, inputs, dynamo=True, optimize=False, opset_version=OPSET, dynamic_shapes=shapes, verbose=False,
            input_names=input_names, output_names=output_names,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def float_copy(model: nn.Module) -> nn.Module:
    """A float copy on the CPU in evaluation mode, without the Trainer that a LightningModule may hold."""
    trainer = model.__dict__.pop("_trainer", None)
    try:
        plain = copy.deepcopy(model)
    finally:
        if trainer is not None:
            model.__dict__["_trainer"] = trainer
    remove(plain)
    return plain.eval().cpu()
