"""Linear layers as torchao's `Int8Tensor`: integer matrix products in torch itself, compiled or not, on CPU and GPU.

    y = (q_x · q_Wᵀ - z · Σ q_W) · s_x · s_W + b          q_x = clip(round(x / s_x) + z, -128, 127)

Integers and scales are those of the quantized layer. Weights of fewer than 8 bits take a byte each; packed files
(`lq_plugin.export.packed`) and ONNX keep them small. On CPU this pays with `torch.compile` and many rows; for few rows
ONNX Runtime is faster (`python -m benchmarks.deploy`).
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.faults import layers_with_kernel
from lq_plugin.export.quiet import quiet
from lq_plugin.extras import need_packages
from lq_plugin.functional.affine import quantize
from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.spec import PerChannel, PerTensor, QuantSpec
from lq_plugin.layers import COMPUTED, QuantizedLayer, QuantizedLinear, quantized_class, weight_is_computed
from lq_plugin.layers.base import detach_quantizers
from lq_plugin.layers.integer.kernels import sums_exactly
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.quantizers import ActivationQuantizer, WeightQuantizer

log = logging.getLogger(__name__)


def use_torchao(model: nn.Module) -> dict[str, str]:
    """Makes weights of linear layers torchao's `Int8Tensor`s, in place, where torchao can compute them.

    The other layers stay as they are. Inputs quantized to 8 bits per tensor become torchao's static quantization (int8
    products); without an input quantizer the weight alone is int8. The state dict saves with `torch.save` and loads
    with `weights_only=True` where torchao is imported.

    Args:
        model: prepared and calibrated. Afterwards it is for inference only.

    Returns:
        The reason for each quantized layer that stays, by its name.

    Raises:
        ExportError: no layer can be changed, with the reason for each.
        MissingPackageError: without torchao (`pip install "lq_plugin[torchao]"`).

    >>> import lq_plugin
    >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> x = torch.randn(64, 16)
    >>> _ = lq_plugin.prepare(net, "w8a8")
    >>> _ = lq_plugin.calibrate(net, [x])
    >>> y = net.eval()(x)
    >>> use_torchao(net), type(net[0].weight.data).__name__, torch.allclose(net(x), y, atol=1e-5)
    ({}, 'Int8Tensor', True)
    """
    need_packages("use_torchao", "torchao")
    reasons, faults = layers_with_kernel(model, why_not)
    raise_all(ExportError, f"no layer of {type(model).__name__} has an integer kernel in torchao", faults)
    chosen = [layer for name, layer in quantized_layers(model) if reasons[name] is None]
    if any(
        layer.input_quantizer is not None and layer.weight.device.type == "cpu" for layer in chosen
    ) and not sums_exactly(127):
        log.warning(
            "torch multiplies 8-bit integers many times slower than floats on a processor without VNNI instructions, "
            "as this one seems to be: ONNX Runtime (export_onnx) is fast there"
        )
    for layer in chosen:
        weight = int8_weight(cast(QuantizedLinear, layer))
        detach_quantizers(layer)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        cast(nn.Module, layer).__class__ = RowsLinear
    return {name: reason for name, reason in reasons.items() if reason is not None}


class RowsLinear(nn.Linear):
    """`nn.Linear` that hands on its input as a matrix: torchao's static quantization takes no other shape."""

    changed_by = "use_torchao"

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        y = F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)


def why_not(layer: QuantizedLayer) -> str | None:
    """Returns the reason why a layer has no integer kernel in torchao, or None."""
    if weight_is_computed(layer):
        return COMPUTED
    current = {slot: _current(layer, slot) for slot in SLOTS}
    for slot, quantizer in current.items():
        if quantizer is not None and (reason := spec_fault(slot, quantizer.spec, layer)) is not None:
            return reason
    if current["weight"] is None:
        return "its weight is float"
    if not all(quantizer.is_calibrated for quantizer in current.values() if quantizer is not None):
        return "it has no range yet: calibrate it"
    return None


def spec_fault(slot: str, spec: QuantSpec, layer: Any) -> str | None:
    """Returns why torchao has no integers for a tensor under a spec; see `Target.spec_fault`.

    Args:
        slot: `"weight"`, `"input"` or `"output"`.
        spec: of the tensor.
        layer: float or quantized.
    """
    kind = quantized_class(layer)
    if kind is None or not issubclass(kind, QuantizedLinear):
        return f"{type(layer).__name__} has none, linear layers do"
    if slot == "output":
        return "its output is quantized"
    integers, whole = spec.is_uniform, isinstance(spec.granularity, PerTensor)
    if slot == "input":
        if not integers or spec.bit_width != 8 or not whole:
            return f"its input is '{spec}', not an integer of 8 bits per tensor"
        if spec.dynamic:
            return f"its input is '{spec}', and torchao gets fixed ranges here"
        if spec.grid.quant_max == 127 and spec.grid.quant_min != -128:
            return f"its input is '{spec}' and stops at {spec.grid.quant_min}, torchao's at -128"
        return None
    rows = whole or isinstance(spec.granularity, PerChannel)
    if not integers or spec.bit_width > 8 or spec.grid.affine or not rows:
        return f"its weight is '{spec}', not a symmetric integer of at most 8 bits per channel or per tensor"
    return None


def int8_weight(layer: QuantizedLinear) -> Tensor:
    """Returns the `Int8Tensor` of a layer that `why_not` accepts."""
    # On import, torchao logs about compiled parts that do not fit this torch, and warns of torch's deprecations.
    with quiet("torchao", "torch.utils._pytree"):
        from torchao.quantization import PerTensor as WholeTensor
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor, QuantizeTensorToInt8Kwargs

    weight, inputs = _current(layer, "weight"), _current(layer, "input")
    assert weight is not None
    with torch.no_grad():
        scale, zero_point = weight.qparams(layer.weight)
        levels = quantize(layer.weight, scale, zero_point, weight.spec.grid).to(torch.int8)
        options: dict[str, Any] = {}
        if inputs is not None:
            grid = inputs.spec.grid
            input_scale, input_zero_point = (value.detach().float().reshape(1, 1) for value in inputs.qparams())
            # uint8 minus 128 is int8.
            shifted = (input_zero_point - grid.quant_min - 128).to(torch.int8)
            options = {
                # A zero point costs a sum over the weight.
                "act_quant_kwargs": QuantizeTensorToInt8Kwargs(
                    WholeTensor(), MappingType.ASYMMETRIC if shifted.any() else MappingType.SYMMETRIC
                ),
                "act_quant_scale": input_scale.clone(),
                "act_quant_zero_point": shifted,
            }
        scale = scale.reshape(-1, 1).expand(layer.out_features, 1).contiguous()
        zeros, block = torch.zeros_like(scale, dtype=torch.int8), [1, layer.in_features]
        return cast(Tensor, Int8Tensor(levels, scale, block, layer.weight.dtype, zeros, **options))


def _current(layer: QuantizedLayer, slot: str) -> Any:
    """Returns the quantizer in force at this stage of its plan, or None."""
    quantizer: WeightQuantizer | ActivationQuantizer | None = getattr(layer, f"{slot}_quantizer")
    return None if quantizer is None else quantizer.current
