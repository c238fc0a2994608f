"""Refusals that export targets share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from lq_plugin.export.codes import nothing_stored
from lq_plugin.export.request import Request
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers import QuantizedLayer, computed_faults
from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.unreached import unreached, without_range
from lq_plugin.utilities.files import replaceable


def shared_faults(request: Request, writes_folder: bool = False) -> list[str]:
    """Returns what keeps a prepared model from being stored in any file, as far as it is settled.

    Args:
        request: with a prepared model.
        writes_folder: the target writes a folder of files.
    """
    model = request.model
    kind = type(model).__name__
    kernels = [
        (name or "the model itself", m.changed_by)
        for name, m in model.named_modules()
        if hasattr(type(m), "changed_by")
    ]
    if kernels:
        listed = ", ".join(name for name, _ in kernels[:5]) + f" and {len(kernels) - 5} more" * (len(kernels) > 5)
        return [
            f"{kind} was changed by {kernels[0][1]} ({listed}), for inference in this process only: export it before, "
            "or load its checkpoint into a new one"
        ]
    layers = quantized_layers(model)
    if not layers:
        return [
            f"{kind} is not quantized, nothing would be in the file: give the Trainer a QAT or PTQ callback, or "
            "prepare and calibrate it, or load its checkpoint"
        ]
    faults = path_faults(request, writes_folder) + (one_input_faults(model) if request.from_loader else [])
    # Before that, what computes a weight may still be taken away.
    faults += computed_faults(layers) if request.settled != "plan" else []
    if request.settled != "ranges":
        return faults + [fault for name, layer in layers for fault in weight_faults(name, layer, "plan")]
    silent = unreached(model)
    faults += [f"{q.name} ({q.spec}) has no range" for q in without_range(model)]
    return faults + [f for name, layer in layers if name not in silent for f in weight_faults(name, layer, "ranges")]


def weight_faults(name: str, layer: QuantizedLayer, settled: str) -> list[str]:
    """Returns why no file can hold a layer's weight: that of its last stage, or of the present one.

    Args:
        name: of the layer.
        layer: quantized.
        settled: see `Request`.
    """
    quantizer = cast(Any, layer.weight_quantizer)
    if quantizer is not None and settled == "ranges":
        quantizer = quantizer.current
        if quantizer is None:
            return [f"{name}.weight is float at this stage of its plan"]
    reason = None if quantizer is None else nothing_stored(quantizer.spec)
    return [] if reason is None else [f"{name}.weight ({quantizer.spec}): {reason}"]


def spec_faults(
    request: Request,
    refusal: Callable[[str, QuantSpec, Any], str | None],
    nearest: Callable[[str, QuantSpec, Any], QuantSpec | None],
) -> list[str]:
    """Returns which tensors of a prepared model a file cannot hold, and the nearest spec that it can.

    Args:
        request: with a prepared model.
        refusal, nearest: those of a target.
    """
    ready = request.settled == "ranges"
    silent = unreached(request.model) if ready else {}
    tensors: list[tuple[str, Any, Any]] = [
        (slot, getattr(layer, f"{slot}_quantizer"), layer)
        for name, layer in quantized_layers(request.model)
        if name not in silent
        for slot in SLOTS
    ]
    tensors += [
        ("input", quantizer, operation)
        for name, operation in quantized_operations(request.model)
        if name not in silent
        for quantizer in operation.quantizers()
    ]
    faults = []
    for slot, quantizer, layer in tensors:
        if quantizer is None:
            continue
        current = quantizer.current if ready else quantizer
        if current is None:
            # Of weights, `shared_faults` says so.
            faults += [f"{quantizer.name} is float at this stage of its plan"] if slot != "weight" else []
            continue
        if (reason := refusal(slot, current.spec, layer)) is None:
            continue
        near = nearest(slot, current.spec, layer)
        advice = "" if near is None else f"; the nearest that fits is '{near}'"
        faults.append(f"{quantizer.name} ({current.spec}): {reason}{advice}")
    return faults


def path_faults(request: Request, writes_folder: bool) -> list[str]:
    """Returns why nothing can be written to a path, once it is to be written: for want of its folder, or what it is.

    Args:
        request: whose path it is.
        writes_folder: a folder of files is to be written there, and no file.
    """
    path = request.path
    if path is None or request.settled != "ranges":
        return []
    if not path.parent.is_dir():
        return [f"cannot write {path}: there is no folder {path.parent}"]
    if writes_folder and not replaceable(path):
        what = "a folder with files that no export wrote" if path.is_dir() else "a file"
        return [f"cannot write {path}: it is {what}, give the name of a new folder, or remove it"]
    if path.is_dir() and not writes_folder:
        return [f"cannot write {path}: it is a folder, give the name of a file"]
    return []


def one_input_faults(model: nn.Module) -> list[str]:
    """Returns the fault of a model that cannot run on the first tensor of a batch alone, naming its inputs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    if len(needed) < 2:
        return []
    return [
        f"{type(model).__name__}.forward needs {len(needed)} inputs ({', '.join(needed)}), and only the first tensor "
        "of a batch is given to it here; call "
        f"lq_plugin.export.export_onnx(model, ({', '.join(needed)}), path) from Python"
    ]


def layers_with_kernel(
    model: nn.Module, why_not: Callable[[QuantizedLayer], str | None]
) -> tuple[dict[str, str | None], list[str]]:
    """Returns why each quantized layer has no kernel (None: it has one), and these reasons as faults where none has."""
    reasons = {name: why_not(layer) for name, layer in quantized_layers(model)}
    if any(reason is None for reason in reasons.values()):
        return reasons, []
    return reasons, [f"{name}: {reason}" for name, reason in reasons.items()] or ["it has no quantized layers"]
