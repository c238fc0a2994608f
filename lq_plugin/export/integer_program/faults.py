"""Refusals of integer programs, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lq_plugin.export.request import Request
from lq_plugin.intent.spec import PerGroup, PerTensor, PerToken, QuantSpec
from lq_plugin.quantizers.registry import format_code

#: Formats besides int that are integers with a scale for each channel, or one.
_SMALL = ("sign", "bwn", "twn")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
#: Of a byte, without -128.
_LARGEST = 127


def spec_fault(slot: str, spec: QuantSpec, layer: Any, runtime: str) -> str | None:
    """Returns why a runtime has no integer kernel for a tensor under a spec; None: it has.

    Args:
        slot: `"weight"`, `"input"` or `"output"`.
        spec: of the tensor.
        layer: a layer, float or quantized, or an operation.
        runtime: its name.
    """
    return _weight_fault(spec, layer, runtime) if slot == "weight" else _activation_fault(spec, runtime)


def _weight_fault(spec: QuantSpec, layer: Any, runtime: str) -> str | None:
    if not isinstance(layer, _LAYERS):
        # That of an LSTM's or an attention's weight is the module that has it.
        owner = getattr(layer, "owner", layer)
        kind = getattr(type(owner), "float_class", type(owner)).__name__
        return f"{runtime} has no integer kernel of {kind}: leave its weight float"
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1:
        return f"{runtime} has no integer kernel of transposed convolutions with groups: leave its weight float"
    if getattr(layer, "input_quantizer", layer) is None:
        return f"{runtime} multiplies integer weights with integer inputs, and the input is float"
    if not (spec.is_uniform or spec.format_name in _SMALL) or format_code(spec).onnx is None:
        return f"its values are no integers with one scale, which {runtime} computes with"
    if isinstance(spec.granularity, PerGroup):
        return f"{runtime} has one scale for each output channel"
    if not spec.is_uniform:
        return None
    grid = spec.grid
    if spec.bit_width > 8:
        return f"weights of {runtime} have at most 8 bits"
    if grid.affine:
        # Codes minus zero point are integers around zero.
        fits = grid.levels - 1 <= _LARGEST
        return None if fits else f"weights of {runtime} have zero point 0"
    if max(-grid.quant_min, grid.quant_max) > _LARGEST:
        return f"weights of {runtime} are -127..127, without -128"
    return None


def _activation_fault(spec: QuantSpec, runtime: str) -> str | None:
    if not spec.is_uniform or isinstance(spec.granularity, PerGroup):
        return f"its scales are found at run time, {runtime} needs one that is fixed"
    if not isinstance(spec.granularity, PerTensor):
        return f"activations of {runtime} have one scale"
    if spec.grid.levels != 256:
        return f"activations of {runtime} have the 256 levels of a byte, this has {spec.grid.levels}"
    return None


def token_fault(slot: str, spec: QuantSpec, layer: Any) -> str | None:
    """Returns why XNNPACK has no kernel for an activation whose range is found at run time; None: it has.

    Its kernels of linear layers find scale and zero point of each token, those of 2-D convolutions of each image, which
    no spec says.

    Args:
        slot: `"input"` or `"output"`.
        spec: of the tensor, dynamic.
        layer: a layer, float or quantized, or an operation.
    """
    if slot == "output":
        return "a range that is found at run time is that of a linear layer's input: leave the output float"
    if not isinstance(layer, nn.Linear):
        kind = getattr(type(layer), "float_class", type(layer)).__name__
        return f"XNNPACK finds the range of each token for linear layers, not for a {kind}: give it a fixed range"
    if getattr(layer, "weight_quantizer", layer) is None:
        return "XNNPACK finds ranges at run time for integer weights, and the weight is float"
    if spec.format_name != "int" or spec.grid.levels != 256:
        return "activations of XNNPACK have the 256 levels of a byte"
    if not isinstance(spec.granularity, PerToken) or not spec.affine:
        return "XNNPACK finds a scale and a zero point of each token"
    return None


def model_faults(request: Request, runtime: str) -> list[str]:
    """Returns what else keeps a model from becoming a program: its precision, and an example that does not fit."""
    model = request.model
    others = {
        name: p.dtype for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32
    }
    faults = []
    if others:
        name, dtype = next(iter(others.items()))
        faults.append(
            f"{type(model).__name__} is in {str(dtype).removeprefix('torch.')} ({name}, {len(others)} parameters), "
            f"a file of {runtime} is made of a float32 one: call model.float(), and verify the file"
        )
    if request.inputs is not None and (
        isinstance(request.inputs, (torch.Tensor, str)) or not isinstance(request.inputs, (list, tuple))
    ):
        kind = type(request.inputs).__name__
        faults.append(f"inputs are the positional arguments of the model's forward, got a {kind}: write (x,)")
    return faults
