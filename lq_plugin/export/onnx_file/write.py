"""Writer of ONNX files in the standard QDQ form, which ONNX Runtime, OpenVINO and TensorRT read.

`torch.onnx.export` exports the float model, which then gets its quantization back: each quantized weight becomes
integers and a DequantizeLinear (or a Gather from its table), each quantized activation a QuantizeLinear and a
DequantizeLinear. Batch norms after a quantized convolution move into its scales and bias; a negative factor changes the
sign of the channel's integers, or of its scale where their type lacks the negative of one of them.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.codes import encode
from lq_plugin.export.onnx_file.biases import settle_biases
from lq_plugin.export.onnx_file.containers import Container, FloatContainer, container
from lq_plugin.export.onnx_file.faults import onnx_faults, tensors_of
from lq_plugin.export.onnx_file.float_model import float_graph, inference_copy
from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.onnx_file.graph import Graph
from lq_plugin.export.onnx_file.operations import operation_nodes
from lq_plugin.export.onnx_file.options import OPTIONS
from lq_plugin.export.onnx_file.queries import layer_calls, products, readers
from lq_plugin.export.onnx_file.steps import marked_nodes, show_quantized_steps
from lq_plugin.export.onnx_file.sums import quantize_sums
from lq_plugin.export.request import Request, option_faults
from lq_plugin.intent.spec import PerChannel, PerTensor
from lq_plugin.layers import CompoundWeight, QuantizedLayer, weight_key
from lq_plugin.model.graph.record import record
from lq_plugin.model.operations.quantized import QuantizedOperation, operations_of, quantized_operations
from lq_plugin.model.prepare import quantized_layers, remove
from lq_plugin.model.survey import input_owner
from lq_plugin.model.unreached import unreached
from lq_plugin.quantizers import ActivationQuantizer
from lq_plugin.quantizers.fp8 import fp8_element
from lq_plugin.utilities import hooks
from lq_plugin.utilities.files import replacing

log = logging.getLogger(__name__)


def export_onnx(
    model: nn.Module,
    inputs: Sequence[Any],
    path: str | Path,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    sums_from: Iterable[Any] | None = None,
    smallest: int = 2,
    dynamic_dims: Sequence[int] = (),
    exported: onnx.ModelProto | None = None,
    signed: bool = False,
    fp4: str = "int8",
    form: Form | None = None,
) -> int:
    """Writes a prepared and calibrated model as ONNX.

    Args:
        model: prepared; it is not changed.
        inputs: positional arguments of its forward, as an example, also nested; at least two samples where the batch is
            dynamic.
        path: of the file.
        dynamic_batch: dim 0 of every input may have any size.
        input_names, output_names: of the graph; as many names as `inputs` has tensors.
        sums_from: calibration batches, each a tensor or a tuple like `inputs`, without targets. With them residual sums
            between convolutions are also rounded to 8 bits, which keeps runtimes in integers
            (`lq_plugin.export.onnx_file.sums`). None: the file rounds only what the plan says.
        smallest: bits of the smallest integer type for weights: 2, 4 (OpenVINO has no INT2, and opset 21 does), or 8.
        dynamic_dims: further dims of every input that may have any size, where it has them: `(1,)` for tokens `[N, L]`.
        exported: the float model's graph, where `float_graph` has made it before for the same inputs: that takes most
            of the time. Not used where the state of an LSTM, a GRU, ... is quantized, whose steps the graph shows then.
        signed: quantized activations are signed integers with zero point 0, as their plan has to say (`int8`); False:
            unsigned ones of the same values, for which ONNX Runtime has faster kernels.
        fp4: how weights in MXFP4 and NVFP4 are held: "int8", for which ONNX Runtime has fast kernels; "uint4" (indices
            of the 16 values) half as large, computed in float by ONNX Runtime and OpenVINO; or "float4" (FLOAT4E2M1) as
            small, for which OpenVINO has kernels and ONNX Runtime 1.32 has none.
        form: choices made for another runtime; None: those of `smallest`, `signed` and `fp4`.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: another precision than float32 or float16, no such folder, names or batches that do not fit; or
            listing every tensor that ONNX cannot say exactly. No file is written then.
        MissingPackageError: without the packages onnx and onnxscript (`pip install "lq_plugin[onnx]"`).
    """
    batches = None if sums_from is None else list(sums_from)
    options = {"smallest": smallest, "dynamic_dims": dynamic_dims, "signed": signed, "fp4": fp4}
    request = Request(options, Path(path), model, "ranges", inputs, batches)
    form = form or Form(smallest=smallest, fp4=fp4, signed=signed)
    faults = option_faults(OPTIONS, options) or onnx_faults(request, input_names, dynamic_batch, form)
    raise_all(ExportError, "cannot export the model", faults)
    free = {
        **({0: torch.export.Dim("batch")} if dynamic_batch else {}),
        **dict.fromkeys(dynamic_dims, torch.export.Dim.DYNAMIC),
    }
    inputs = _without_empty_keywords(model, inputs)
    silent = unreached(model)
    for name in silent:
        log.warning("%s is float in %s: no batch has reached it", name, path)
    layers = [(name, layer) for name, layer in quantized_layers(model) if name not in silent]
    weights, activations = _collect(layers, form.fp4)
    plain = inference_copy(model)
    ran = _layers_that_run(plain, inputs)
    remove(plain)
    stepwise = show_quantized_steps(model, plain, silent)
    arguments = tuple(inspect.signature(plain.forward).bind(*inputs).arguments.values())
    shapes = (
        tree_map(lambda x: {d: free[d] for d in free if d < x.ndim} if isinstance(x, Tensor) else None, arguments)
        if free
        else None
    )
    made = (
        float_graph(plain, tuple(inputs), shapes, input_names, output_names)
        if exported is None or stepwise
        else copy.deepcopy(exported)
    )
    if stepwise:
        _warn_of_fixed_dims(made, inputs, free, (path, ", ".join(sorted(stepwise))))
    graph = Graph(made, form, {name for name, quantizer in activations.items() if _reads_bytes(quantizer)})
    operations = [(name, operation) for name, operation in quantized_operations(model) if name not in silent]
    # Before the graph changes. What the float model does is what the exporter has seen.
    outside = any(operation.operation.place[0] not in stepwise for _, operation in operations)
    recorded = operations_of(record(plain, lambda: plain(*inputs))) if outside else {}
    nodes_of = operation_nodes(graph.model, recorded.values())
    for name in (name for name, _ in layers if name not in ran):
        log.warning("%s does not run on the example inputs: neither the model nor %s quantizes it", name, path)
    nodes, faults = _put_weights(
        graph, [(name, layer) for name, layer in layers if name in ran], model, plain, weights, activations
    )
    # After all weights, which take batch norms out of the graph.
    # One node may be of several weights: an LSTM of both directions.
    readers_of = {
        id(node): (node, activations[name], operand)
        for name in nodes if name in activations for node, operand in nodes[name]
    }  # fmt: skip
    for reader in readers_of.values():
        _put_activation(graph, *reader)
    faults += _put_operations(graph, operations, nodes_of)
    raise_all(ExportError, "cannot export the model", faults)
    for name, what in graph.slow.items():
        log.warning(
            "%s: ONNX Runtime has no kernel for %s and is many times slower with them; smallest=4 writes 4 bits",
            name,
            what,
        )
    return _write(graph, batches, path)


def _write(graph: Graph, batches: list[Any] | None, path: str | Path) -> int:
    """Settles what depends on the whole graph, checks it and writes it; returns the size of the file, in bytes."""
    form, file = graph.form, graph.finish()
    if batches is not None and not quantize_sums(file, (_feed(file, batch) for batch in batches), signed=form.signed):
        log.warning("%s: sums_from has no effect, no sum in the graph reads an integer convolution", path)
    for bias in settle_biases(file) if form.integer_biases else ():
        log.warning(
            "%s does not fit into int32 next to weights that small and is added in float: ONNX Runtime is slower there",
            bias,
        )
    onnx.checker.check_model(file, full_check=True)
    if form.lint is not None:
        raise_all(
            ExportError, f"{path} is not written, its graph breaks rules", [str(found) for found in form.lint(file)]
        )
    with replacing(path, ExportError) as stream:
        onnx.save(file, stream)
    return Path(path).stat().st_size


def _warn_of_fixed_dims(
    made: onnx.ModelProto, inputs: Sequence[Any], free: Collection[int], words: tuple[Any, str]
) -> None:
    """Says which dims of inputs were to be free and are constant in a file of these words: its path, its layers."""
    for value, x in zip(made.graph.input, tensors_of(inputs), strict=False):
        for dim, entry in enumerate(value.type.tensor_type.shape.dim):
            if dim in free and dim < x.ndim and entry.HasField("dim_value"):
                log.warning(
                    "dim %d of %s is always %d in %s: it shows each step of %s, whose state is quantized; a float "
                    "state (see README) leaves the length of sequences open",
                    dim, value.name, entry.dim_value, *words,
                )  # fmt: skip


def _put_weights(
    graph: Graph,
    layers: Sequence[tuple[str, QuantizedLayer]],
    model: nn.Module,
    plain: nn.Module,
    weights: Mapping[str, Container | FloatContainer],
    activations: Mapping[str, ActivationQuantizer],
) -> tuple[dict[str, list[tuple[onnx.NodeProto, int]]], list[str]]:
    """Lets the nodes of each layer read its weight from integers.

    Returns these nodes by layer, and which input of theirs is the layer's; and faults.
    """
    faults: list[str] = []
    nodes: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    names = _names(model)
    for name, layer in layers:
        try:
            source = _initializer_of(weight_key(name, layer), plain, graph)
            users = readers(graph.graph, source, names[id(_module(layer))])
            if not users:
                raise ExportError(f"{source} is read by no node of the exported graph that belongs to {name}")
            if isinstance(layer, CompoundWeight):
                nodes[name] = products(graph.graph, source, users)
                if name in activations:
                    _refuse_products(source, nodes[name], activations[name])
                if name in weights:
                    graph.put_parameter(name, source, users, (weights[name], False))
            elif (found := layer_calls(graph.graph, users, layer)) is not None:
                nodes[name], transposed = [(node, 0) for node in found[0]], found[1]
                if name in weights:
                    graph.put_weight(name, source, found[0], _oriented(weights[name], layer, name), transposed)
            elif name not in activations:
                graph.put_parameter(name, source, users, _oriented(weights[name], layer, name))
            else:
                raise ExportError(
                    f"{name}: the forward of {type(layer).float_class.__name__} has no one node that reads its input; "
                    "leave that float"
                )
        except ExportError as error:
            faults.append(str(error))
    return nodes, faults


def _refuse_products(source: str, found: Sequence[tuple[onnx.NodeProto, int]], quantizer: ActivationQuantizer) -> None:
    """Refuses products whose input the file cannot quantize as the layer does.

    Raises:
        ExportError: an einsum of more than two factors, or axes of scales that are not those of the layer.
    """
    if any(len(node.input) != 2 for node, _ in found if node.op_type == "Einsum"):
        raise ExportError(f"{source}: an einsum of more than two factors does not tell which is the layer's input")
    moved = any(operand or node.op_type == "Einsum" for node, operand in found)
    if moved and not isinstance(quantizer.spec.granularity, PerTensor):
        raise ExportError(
            f"{source}: its input has other axes in the product of the file than in the layer, and '{quantizer.spec}' "
            "has more than one scale"
        )


def _without_empty_keywords(model: nn.Module, inputs: Sequence[Any]) -> Sequence[Any]:
    """Returns the inputs without the `{}` that torch.onnx.export wants after a dictionary, if the model takes none."""
    if len(inputs) < 2 or inputs[-1] != {} or not isinstance(inputs[-1], dict):
        return inputs
    try:
        inspect.signature(model.forward).bind(*inputs)
    except TypeError:
        return inputs[:-1]
    return inputs


def _feed(file: onnx.ModelProto, batch: Any) -> dict[str, Any]:
    """Returns a batch as arrays by input name."""
    return {value.name: x.detach().cpu().numpy() for value, x in zip(file.graph.input, tensors_of(batch), strict=True)}


def _collect(
    layers: Sequence[tuple[str, QuantizedLayer]], fp4: str
) -> tuple[dict[str, Container | FloatContainer], dict[str, ActivationQuantizer]]:
    weights: dict[str, Container | FloatContainer] = {}
    activations: dict[str, ActivationQuantizer] = {}
    faults: list[str] = []
    by_name = dict(layers)
    for name, layer in layers:
        if layer.weight_quantizer is not None:
            quantizer = cast(Any, layer.weight_quantizer).current
            try:
                weights[name] = container(
                    quantizer.spec, encode(quantizer, type(layer).canonical(layer, layer.weight)), f"{name}.weight", fp4
                )
            except ExportError as error:
                faults.append(str(error))
        reads = by_name.get(input_owner(name, layer))
        if reads is not None and (found := reads.input_quantizer) is not None:
            activations[name] = found.current
    raise_all(ExportError, "cannot export the model", faults)
    return weights, activations


def _put_operations(
    graph: Graph, operations: Iterable[tuple[str, QuantizedOperation]], nodes: Mapping[str, onnx.NodeProto]
) -> Iterator[str]:
    """Quantizes the operands of operations; yields faults."""
    for name, operation in operations:
        indices = operation.operation.operands
        marked = [marked_nodes(graph.graph, name, index) for index in indices]
        if name not in nodes and not all(marked):
            yield f"{name}: the exported graph has no one node for this {operation.operation.op}, leave it float"
            continue
        for index, inside, quantizer in zip(indices, marked, operation.quantizers(), strict=True):
            for node in inside:
                _put_activation(graph, node, quantizer.current)
            if not inside:
                _put_activation(graph, nodes[name], quantizer.current, index)


def _put_activation(graph: Graph, node: onnx.NodeProto, quantizer: ActivationQuantizer, operand: int = 0) -> None:
    if quantizer.spec.dynamic:
        graph.put_dynamic(node, operand)
    elif quantizer.spec.format_name == "fp8":
        scale = quantizer.qparams()[0].detach().float().reshape(())
        graph.put_float(node, scale, fp8_element(quantizer.spec), operand)
    else:
        graph.put_activation(node, *_activation(quantizer), operand=operand)


def _layers_that_run(quantized: nn.Module, inputs: Sequence[Any]) -> set[str]:
    """Returns names of the layers that run on the example inputs; others are float in the file.

    An example that does not fit raises the model's own error here; the exporter's is long.
    """
    ran: set[str] = set()
    layers = quantized_layers(quantized)
    handles = [hooks.after(_module(layer), lambda *_, name=name: ran.add(name)) for name, layer in layers]
    with torch.no_grad():
        quantized(*inputs)
    for handle in handles:
        handle.remove()
    return ran


def _module(layer: QuantizedLayer | CompoundWeight) -> nn.Module:
    """Returns the module whose forward reads a layer's weight."""
    return layer.owner if isinstance(layer, CompoundWeight) else layer


def _names(model: nn.Module) -> dict[int, set[str]]:
    """Returns all names of each module; a shared one has several."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].add(name)
    return names


def _initializer_of(key: str, plain: nn.Module, graph: Graph) -> str:
    """Returns the graph's name of a weight: of a tied one it knows the key that the exporter met first."""
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    return next(
        (other for other, parameter in parameters.items() if parameter is parameters.get(key) and other in graph.known),
        key,
    )


def _oriented(
    content: Container | FloatContainer, layer: QuantizedLayer, name: str
) -> tuple[Container | FloatContainer, bool]:
    """Returns the container, and True where the layer keeps its weight with dims 0 and 1 exchanged."""
    probe = torch.arange(content.q.numel()).reshape(content.q.shape)
    held = type(layer).from_canonical(layer, probe)
    if torch.equal(held, probe):
        return content, False
    if held.shape == probe.transpose(0, 1).shape and torch.equal(held, probe.transpose(0, 1)):
        return content, True
    raise ExportError(f"{name}: a transposed convolution with groups holds its channels along no single axis of ONNX")


def _reads_bytes(quantizer: ActivationQuantizer) -> bool:
    """Returns True for an input that is at most 8-bit integers with one scale in the file."""
    spec = quantizer.spec
    return spec.is_uniform and spec.bit_width <= 8 and isinstance(spec.granularity, PerTensor)


def _activation(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, Any, int | None]:
    """Returns scale and zero point in ONNX's shape, the grid, and the axis of per-channel ones."""
    scale, zero_point = (value.detach().float() for value in quantizer.qparams())
    axis = quantizer.axis if isinstance(quantizer.spec.granularity, PerChannel) else None
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return scale, zero_point, quantizer.spec.grid, axis
