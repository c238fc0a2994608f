"""Refusals of ONNX files, in one place: what they cannot hold of a model, of its plan, and of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq_plugin.export.faults import shared_faults
from lq_plugin.export.onnx_file.containers import refusal
from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.request import Request
from lq_plugin.intent.spec import PerGroup, PerTensor, QuantSpec
from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.unreached import unreached
from lq_plugin.quantizers import ActivationQuantizer


def onnx_faults(
    request: Request, input_names: Sequence[str] | None = None, dynamic_batch: bool = True, form: Form | None = None
) -> list[str]:
    """Returns what keeps a request from becoming an ONNX file, as far as it is known.

    Args:
        request: with a prepared model, and valid options.
        input_names: of the graph.
        dynamic_batch: dim 0 of every input may have any size.
        form: choices made for a runtime; None: for ONNX Runtime.
    """
    model, form = request.model, form or Form()
    ready = request.settled == "ranges"
    silent = unreached(model) if ready else {}
    faults = shared_faults(request) + precision_faults(model)
    for name, layer in quantized_layers(model):
        if name in silent:
            continue
        weight = cast(Any, layer.weight_quantizer)
        # The shape is the quantizer's: a strategy may hold the weight in shards.
        current = weight.current if weight is not None and ready else weight
        if current is not None and (reason := refusal(current.spec, weight.shape[0])) is not None:
            faults.append(f"{name}.weight ({current.spec}): {reason}")
        elif current is not None and form.weight_fault is not None:
            reason = form.weight_fault(current.spec, tuple(weight.shape), layer)
            faults += [] if reason is None else [f"{name}.weight ({current.spec}): {reason}"]
        if layer.output_quantizer is not None:
            faults.append(
                f"{name}.output: a file has one step between two layers, that of the next one's input: leave the "
                "output float"
            )
        if layer.input_quantizer is not None:
            faults += _activation_faults(layer.input_quantizer, ready, form)
    for name, operation in quantized_operations(model):
        if name not in silent:
            faults += [f for quantizer in operation.quantizers() for f in _activation_faults(quantizer, ready, form)]
    if request.inputs is None:
        return faults
    return faults + _input_faults(request, request.inputs, input_names, dynamic_batch)


def precision_faults(model: nn.Module) -> list[str]:
    """Returns the fault of a model in another precision than float32: its ranges and rounding are those of that one."""
    parameters = model.named_parameters()
    others = {name: p.dtype for name, p in parameters if p.is_floating_point() and p.dtype != torch.float32}
    if not others:
        return []
    name, dtype = next(iter(others.items()))
    return [
        f"{type(model).__name__} is in {str(dtype).removeprefix('torch.')} ({name}, {len(others)} parameters), an ONNX "
        "file is made of a float32 one: call model.float(), and verify the file"
    ]


def _activation_faults(quantizer: ActivationQuantizer, ready: bool, form: Form) -> list[str]:
    """Returns what ONNX cannot hold of an activation: of its last stage, or of the present one once it is written."""
    current = quantizer.current if ready else quantizer
    if current is None:
        return [f"{quantizer.name} is float at this stage of its plan"]
    if not current.spec.is_uniform or isinstance(current.spec.granularity, PerGroup):
        return [f"{current.name} ({current.spec}): its scales are found at run time, QuantizeLinear needs them fixed"]
    reason = _form_fault(current.spec, form)
    return [] if reason is None else [f"{current.name} ({current.spec}): {reason}"]


def _form_fault(spec: QuantSpec, form: Form) -> str | None:
    """Returns why a file of that form cannot hold an activation, with the nearest spec that it can; else None."""
    grid, reasons = spec.grid, []
    changes: dict[str, Any] = {}
    if spec.bit_width > form.activation_bits:
        reasons.append(f"activations have at most {form.activation_bits} bits")
        changes["bit_width"] = form.activation_bits
    if not (form.channel_activations or isinstance(spec.granularity, PerTensor)):
        reasons.append("activations have one scale")
        changes["granularity"] = PerTensor()
    bits = 8 if grid.levels <= 256 else 16
    if form.signed and (grid.affine or grid.quant_max >= 2 ** (bits - 1)):
        reasons.append("activations are signed integers with zero point 0")
        changes |= {"signed": True, "affine": False}
    if not reasons:
        return None
    if spec.range_name == "pact" and "signed" in changes:
        # It clips at 0: half of the signed levels.
        changes |= {"signed": False, "bit_width": min(spec.bit_width, form.activation_bits) - 1}
    return f"{' and '.join(reasons)}; the nearest that fits is '{spec.replace(**changes)}'"


def _input_faults(
    request: Request, inputs: Sequence[Any], input_names: Sequence[str] | None, dynamic_batch: bool
) -> list[str]:
    """Returns how names, dims and calibration batches do not fit the example."""
    if isinstance(inputs, (Tensor, str)) or not isinstance(inputs, Sequence):
        return [
            f"inputs are the positional arguments of the model's forward, got a {type(inputs).__name__}: write (x,)"
        ]
    examples, dims = tensors_of(inputs), request.options.get("dynamic_dims", ())
    faults = []
    if input_names is not None and (isinstance(input_names, str) or len(input_names) != len(examples)):
        faults.append(f"input_names are {len(examples)}, as many as there are tensors in inputs, got {input_names!r}")
    most = max((x.ndim for x in examples), default=0)
    if unfit := [str(dim) for dim in dims if dim >= most]:
        faults.append(
            f"dynamic_dims are dims after the batch that an input has, 1 to {most - 1}; got {', '.join(unfit)}"
        )
    if request.batches is not None and not request.batches:
        faults.append("sums_from: the ranges of residual sums need calibration data, there were no batches")
    free = {*dims, *([0] if dynamic_batch else [])}
    for index, batch in enumerate(request.batches or ()):
        faults += [f"sums_from: batch {index} {fault}" for fault in _batch_faults(batch, examples, free)]
    return faults


def _batch_faults(batch: Any, examples: Sequence[Tensor], free: set[int]) -> Iterator[str]:
    """Yields how a calibration batch differs from the example's tensors in more than the sizes that are free."""
    if not isinstance(batch, (Tensor, tuple, list)):
        yield f"is a tensor or a tuple like inputs, got {type(batch).__name__}"
        return
    values = tensors_of(batch)
    if len(values) != len(examples):
        yield (
            f"has {len(values)} tensors, the model has {len(examples)} inputs; targets do not belong in it: of (x, y) "
            "give x"
        )
        return
    for number, (x, example) in enumerate(zip(values, examples, strict=True)):
        differ = {dim for dim, sizes in enumerate(zip(x.shape, example.shape, strict=False)) if sizes[0] != sizes[1]}
        if x.dtype != example.dtype or x.ndim != example.ndim or not differ <= free:
            wanted = f"{example.dtype} of shape {list(example.shape)}"
            yield f"has {x.dtype} of shape {list(x.shape)} as input {number}, the example has {wanted}"


def tensors_of(value: Any) -> list[Tensor]:
    """Returns the tensors of nested arguments in the order of the graph's inputs; numbers are constants there."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
