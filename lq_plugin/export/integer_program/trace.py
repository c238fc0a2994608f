"""Conversion of a prepared model to a graph with quantize and dequantize nodes, by tracing its swapped quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lq_plugin.errors import ExportError
from lq_plugin.export.codes import encode
from lq_plugin.export.integer_program.graph import HIGH, LOW, WEIGHT_HIGH, WEIGHT_LOW, kind, operations
from lq_plugin.export.quiet import quiet
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.copies import copy_model
from lq_plugin.model.operations.quantized import quantized_operations
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.unreached import unreached
from lq_plugin.quantizers import ActivationQuantizer, Container
from lq_plugin.quantizers.registry import format_code


class Rounding(nn.Module):
    """Stands for an activation quantizer: quantizes to signed bytes and back.

    Unsigned levels are 128 lower there, and so is their zero point: the real numbers stay.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero_point = quantizer.qparams()
        self.scale = float(scale.detach())
        self.zero_point = int(zero_point.detach()) + LOW - quantizer.spec.grid.quant_min

    def forward(self, x: Tensor) -> Tensor:
        levels = (self.scale, self.zero_point, LOW, HIGH, torch.int8)
        codes = operations().quantize_per_tensor.default(x, *levels)
        y: Tensor = operations().dequantize_per_tensor.default(codes, *levels)
        return y


class TokenRounding(nn.Module):
    """Stands for a quantizer of tokens: signed bytes whose scale and zero point are found at run time, for each row."""

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = operations().choose_qparams_per_token_asymmetric.default(x, torch.int8)
        levels = (scale, zero_point, LOW, HIGH, torch.int8)
        codes = operations().quantize_per_token.default(x, *levels)
        y: Tensor = operations().dequantize_per_token.default(codes, *levels, torch.float32)
        return y


class StoredWeight(nn.Module):
    """Stands for a weight: signed bytes with a scale for each output channel.

    Args:
        codes: int8, in the shape that the layer holds its weight in.
        scale: float32 `[C_out]`.
        axis: of the output channels.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int64))

    def forward(self, weight: Tensor | None = None) -> Tensor:
        y: Tensor = operations().dequantize_per_channel.default(
            self.codes, self.scale, self.zero_point, self.axis, WEIGHT_LOW, WEIGHT_HIGH, torch.int8
        )
        return y


def traced(model: nn.Module, inputs: Sequence[Any]) -> GraphModule:
    """Returns the graph of a prepared and calibrated model, with integers for weights.

    Args:
        model: prepared; it is not changed. Its specs are those that `spec_fault` takes.
        inputs: positional arguments, as an example; the program takes tensors of these shapes.

    Raises:
        ExportError: torch cannot trace it.
    """
    copy = copy_model(model).eval().cpu()
    silent = unreached(copy)
    for name, layer in quantized_layers(copy):
        _swap_quantizers(name, layer, name in silent)
    for name, operation in quantized_operations(copy):
        for key, quantizer in list(operation.named_children()):
            operation.register_module(key, nn.Identity() if name in silent else Rounding(cast(Any, quantizer).current))
    with quiet("torch"), torch.no_grad():
        try:
            program = torch.export.export(copy, tuple(inputs), strict=False)
        # torch raises errors of many classes for code that it cannot follow.
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ExportError(f"torch.export cannot follow {type(model).__name__}.forward: {first}") from error
        module = cast(GraphModule, program.run_decompositions({}).module(check_guards=False))
    _simplify(module)
    return module


def _simplify(module: GraphModule) -> None:
    """Takes copies out of a graph without mutation, and lets global pools be the means that they are."""
    for node in list(module.graph.nodes):
        if kind(node) in ("aten.clone.default", "aten.alias.default", "aten.detach.default"):
            node.replace_all_uses_with(node.args[0])
        elif kind(node) in ("aten.view.default", "aten._unsafe_view.default"):
            # Which does not mind that what made its input contiguous is gone.
            node.target = torch.ops.aten.reshape.default
        elif kind(node) == "aten.copy.default" and _alike(*node.args[:2]):
            node.replace_all_uses_with(node.args[1])
        elif kind(node) == "aten.adaptive_avg_pool2d.default" and list(node.meta["val"].shape[-2:]) == [1, 1]:
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [2, 3], True)
        elif kind(node) == "aten.mean.dim" and _is_global_pool(node):
            _keep_dims(module, node)
    module.graph.eliminate_dead_code()


def _is_global_pool(node: Any) -> bool:
    """Returns True for a mean over the last two of four dims that drops them."""
    dims, *keep = node.args[1:3]
    rank = node.args[0].meta["val"].ndim
    return rank == 4 and sorted(dim % 4 for dim in dims) == [2, 3] and not (keep and keep[0])


def _keep_dims(module: GraphModule, node: Any) -> None:
    """Lets a mean keep its dims, and a view drop them: runtimes have an integer kernel for that."""
    dropped = node.meta["val"]
    with module.graph.inserting_after(node):
        view = module.graph.call_function(torch.ops.aten.reshape.default, (node, list(dropped.shape)))
    view.meta.update(node.meta)
    node.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)
    node.args = (node.args[0], [2, 3], True)
    node.meta["val"] = dropped[..., None, None]


def _alike(one: Any, other: Any) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def _swap_quantizers(name: str, layer: QuantizedLayer, is_silent: bool) -> None:
    slots: Any = layer
    if layer.weight_quantizer is not None and not is_silent:
        stored = StoredWeight(*_integers(name, layer))
        layer.add_module("stored_weight", stored)
        # Before the method of that name, for what the layer reads instead.
        layer.__dict__["quantized_weight"] = stored
    slots.weight_quantizer = None
    for slot in ("input_quantizer", "output_quantizer"):
        quantizer = getattr(layer, slot)
        if quantizer is not None:
            setattr(slots, slot, None if is_silent else _rounding(quantizer.current))


def _rounding(quantizer: ActivationQuantizer) -> nn.Module:
    return TokenRounding() if quantizer.spec.dynamic else Rounding(quantizer)


def _integers(name: str, layer: QuantizedLayer) -> tuple[Tensor, Tensor, int]:
    """Returns codes, scales and the channels' axis of a layer's weight."""
    quantizer = cast(Any, layer.weight_quantizer).current
    parts = encode(quantizer, type(layer).canonical(layer, layer.weight))
    make = format_code(quantizer.spec).onnx
    assert make is not None
    held = make(quantizer.spec, {key: part.values.detach() for key, part in parts.items()})
    assert isinstance(held, Container)
    assert held.scale is not None
    codes, channels = held.q, held.q.shape[0]
    if held.zero_point is not None:
        codes = codes - held.zero_point.reshape(-1, *[1] * (codes.ndim - 1))
    if int(codes.abs().max()) > WEIGHT_HIGH:
        raise ExportError(
            f"{name}.weight ({quantizer.spec}): it has levels beyond {WEIGHT_LOW}..{WEIGHT_HIGH}, say 'narrow'"
        )
    scale = held.scale.detach().float().reshape(-1).expand(channels).clone()
    turned = type(layer).from_canonical(layer, codes)
    axis = 0 if turned.shape == codes.shape and torch.equal(turned, codes) else 1
    return turned.to(torch.int8).contiguous(), scale, axis
