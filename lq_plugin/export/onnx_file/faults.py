"""Refusals of ONNX files, in one place: what they cannot hold of a model, of its plan, and of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq_plugin.export.faults import shared_faults, spec_faults
from lq_plugin.export.onnx_file.containers import refusal
from lq_plugin.export.onnx_file.form import Form
from lq_plugin.export.onnx_file.options import TAKES
from lq_plugin.export.request import Request
from lq_plugin.export.target import nearest_spec
from lq_plugin.intent.spec import PerGroup, PerTensor, QuantSpec
from lq_plugin.layers import OwnWeight, weight_shape


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

    def fault(slot: str, spec: QuantSpec, layer: Any) -> str | None:
        return spec_fault(form or Form(), slot, spec, layer)

    def nearest(slot: str, spec: QuantSpec, layer: Any) -> QuantSpec | None:
        return nearest_spec(TAKES.get(slot, ()), spec, lambda other: fault(slot, other, layer))

    faults = shared_faults(request) + precision_faults(request.model, form or Form(), request.batches is not None)
    faults += spec_faults(request, fault, nearest)
    faults += [
        f"{name or 'the model'}: ONNX Runtime 1.32 ends the process when it loads what torch makes of nn.EmbeddingBag "
        "with mode='mean'; sum the rows and divide, or read an nn.Embedding"
        for name, module in request.model.named_modules()
        if isinstance(module, nn.EmbeddingBag) and module.mode == "mean"
    ]
    if request.inputs is None:
        return faults
    return faults + _input_faults(request, request.inputs, input_names, dynamic_batch)


def spec_fault(form: Form, slot: str, spec: QuantSpec, layer: Any) -> str | None:
    """Returns why a file of that form cannot hold a tensor under a spec; see `Target.spec_fault`.

    Args:
        form: of the file.
        slot: `"weight"`, `"input"` or `"output"`.
        spec: of the tensor.
        layer: float or quantized.
    """
    if slot == "output":
        return "a file has one step between two layers, that of the next one's input: leave the output float"
    if isinstance(layer, OwnWeight) and (layer.experts is not None or layer.inputs_first):
        owner = getattr(type(layer.owner), "float_class", type(layer.owner)).__name__
        return f"a file holds weights [out, in] of one matrix, not those that {owner} keeps otherwise: leave it float"
    if slot == "weight":
        return refusal(spec, weight_shape(layer)[0]) or (form.weight_fault and form.weight_fault(spec, layer))
    if spec.dynamic:
        return _dynamic_fault(form, spec)
    if spec.format_name == "fp8":
        return _fp8_fault(form, spec)
    if not spec.is_uniform or isinstance(spec.granularity, PerGroup):
        return "its scales are found at run time, QuantizeLinear needs them fixed"
    reasons = []
    if spec.bit_width > form.activation_bits:
        reasons.append(f"activations have at most {form.activation_bits} bits")
    if not (form.channel_activations or isinstance(spec.granularity, PerTensor)):
        reasons.append("activations have one scale")
    bits = 8 if spec.grid.levels <= 256 else 16
    if form.signed and (spec.grid.affine or spec.grid.quant_max >= 2 ** (bits - 1)):
        reasons.append("activations are signed integers with zero point 0")
    return " and ".join(reasons) or None


def _dynamic_fault(form: Form, spec: QuantSpec) -> str | None:
    """Returns why DynamicQuantizeLinear does not compute a spec, or None: it has unsigned bytes and one scale."""
    if not form.dynamic or form.signed:
        return "its range is found at run time, these files hold fixed ones"
    fits = spec.is_uniform and spec.affine and not spec.signed and spec.bit_width == 8
    if fits and isinstance(spec.granularity, PerTensor):
        return None
    return "DynamicQuantizeLinear has unsigned 8-bit integers with a zero point, and one scale for the tensor"


def _fp8_fault(form: Form, spec: QuantSpec) -> str | None:
    """Returns why QuantizeLinear does not compute an FP8 activation with a fixed range, or None."""
    if not form.float_activations:
        return "activations of these files are integers"
    return None if isinstance(spec.granularity, PerTensor) else "FP8 activations of these files have one scale"


def precision_faults(model: nn.Module, form: Form, sums: bool) -> list[str]:
    """Returns why a file cannot hold a model in its precision.

    Args:
        model: prepared.
        form: choices made for a runtime.
        sums: residual sums are to be rounded as well.
    """
    parameters = ((name, p) for name, p in model.named_parameters() if "_quantizer." not in name)
    kinds = {name: p.dtype for name, p in parameters if p.is_floating_point()}
    others = {name: kind for name, kind in kinds.items() if kind != torch.float32}
    if not others:
        return []
    name, dtype = next(iter(others.items()))
    if dtype == torch.float16 and len(set(kinds.values())) == 1 and form.half and not sums:
        return []
    why = {
        torch.bfloat16: "ONNX Runtime 1.32 has no kernels for bfloat16 on a CPU",
        torch.float16: "float16 goes with one precision for all parameters, and without round_sums (sums_from)",
    }.get(dtype, "a file is float32 or float16")
    if dtype == torch.float16 and not form.half:
        why = "this file is float32"
    return [
        f"{type(model).__name__} is in {str(dtype).removeprefix('torch.')} ({name}, {len(others)} of {len(kinds)} "
        f"parameters): {why}; call model.float(), and verify the file"
    ]


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
