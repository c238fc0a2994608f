"""IF4 as quantizers: blocks of small floats or of integers (see `lq_plugin.functional.if4`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from lq_plugin.functional.affine import quantize
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels, TableLevels
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.if4 import GRID, cast_if4, fake_quantize_if4, if4_scales, if4_step
from lq_plugin.functional.minifloat import E2M1, E4M3, minifloat_codes, minifloat_values, signed_values
from lq_plugin.functional.nvfp4 import BLOCK, nvfp4_tensor_scale
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.blockwise import NVFP4ActivationQuantizer, NVFP4WeightQuantizer
from lq_plugin.quantizers.registry import Container, Part, Parts, Statistics, Storage, Values, register_format


@dataclass(frozen=True)
class IF4Levels(FixedLevels):
    """E2M1 numbers under s · g, or integers under δ.

    Args:
        integers: bool like `scale`, which of them.
        tensor_scale: g.
    """

    integers: Tensor
    tensor_scale: Tensor

    @property
    def step(self) -> Tensor:
        return if4_step(self.scale, self.integers)

    def neighbours(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        floats = TableLevels(self.step, self.zero_point, False, signed_values(E2M1)).neighbours(w)
        whole = IntegerLevels(self.step, self.zero_point, False, GRID).neighbours(w)
        low, high, place = (torch.where(self.integers, *pair) for pair in zip(whole, floats, strict=True))
        return low, high, place

    def nearest(self, w: Tensor) -> Tensor:
        return cast_if4(w, self.scale, self.integers)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> IF4Levels:
        return replace(super().mapped(change), integers=change(self.integers))


class IF4WeightQuantizer(NVFP4WeightQuantizer):
    """Weights in IF4."""

    #: Of fixed scales: which blocks are integers.
    integers: Tensor
    fixed_buffers: ClassVar[tuple[str, ...]] = (*NVFP4WeightQuantizer.fixed_buffers, "integers")

    def make_qparams(self) -> None:
        super().make_qparams()
        self.register_buffer("integers", torch.zeros(self.scale_shape, dtype=torch.bool), persistent=False)

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        scale, integers, above = self._chosen(w)
        return IF4Levels(scale.clone(), torch.zeros_like(scale), False, integers.clone(), above.clone().reshape(1))

    def keep_levels(self, levels: FixedLevels) -> None:
        super().keep_levels(levels)
        with torch.no_grad():
            self.integers.copy_(cast(IF4Levels, levels).integers)

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        scale, integers, _ = self._chosen(w)
        return unblocks(cast_if4(w, scale, integers), x.shape, self.spec.granularity)

    def _chosen(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns s · g, which blocks are integers, and g."""
        if self.is_fixed:
            return self.scale, self.integers, self.tensor_scale
        block, integers, above = if4_scales(w, self._above(w))
        return block * above, integers, above


class IF4ActivationQuantizer(NVFP4ActivationQuantizer):
    """Activations in IF4, with a calibrated scale of the tensor."""

    def rounded_vectors(self, vectors: Tensor) -> Tensor:
        return fake_quantize_if4(vectors, self.scale)

    def block_rule(self) -> None:
        return None


def _statistics(quantizer: IF4WeightQuantizer, w: Tensor) -> Statistics:
    if quantizer.is_fixed:
        return (*quantizer.stored_scales(), quantizer.integers)
    return (nvfp4_tensor_scale(torch.maximum(w.amax(), -w.amin())).reshape(1),)


def _encode(quantizer: IF4WeightQuantizer, w: Tensor, tensor_scale: Tensor, *fixed: Tensor) -> Parts:
    block, integers = fixed or if4_scales(w, tensor_scale)[:2]
    scale = block * tensor_scale
    whole = quantize(w, if4_step(scale, torch.ones_like(integers)), torch.zeros(()), GRID) & 15
    codes = torch.where(integers, whole, minifloat_codes(w * scale.reciprocal(), E2M1))
    return {
        "codes": Part(codes, 4),
        "scale": Part(minifloat_codes(torch.where(integers, -block, block), E4M3), 8),
        "tensor_scale": Part(tensor_scale),
    }


def _steps(values: Values) -> tuple[Tensor, Tensor]:
    """Returns the steps of stored blocks, and which of them are integers."""
    signed = minifloat_values(values["scale"], E4M3)
    integers = signed < 0
    return if4_step(signed.abs() * values["tensor_scale"], integers), integers


def _levels(codes: Tensor, integers: Tensor) -> Tensor:
    return torch.where(integers, ((codes ^ 8) - 8).float(), minifloat_values(codes, E2M1))


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    step, integers = _steps(parts)
    return _levels(parts["codes"], integers) * step


def _container(spec: QuantSpec, values: Values) -> Container:
    """Returns INT8: the integers, and the floats in halves."""
    step, integers = (t.squeeze(2) for t in _steps(values))
    codes, halves = values["codes"], torch.where(integers, 1.0, 2.0)
    each = [t.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]] for t in (integers, halves)]
    return Container((_levels(codes, each[0]) * each[1]).to(torch.int32), 8, True, step / halves, block=BLOCK)


register_format(
    "if4",
    FORMATS["if4"],
    weight=IF4WeightQuantizer,
    activation=IF4ActivationQuantizer,
    storage=Storage(_encode, _decode, _statistics),
    onnx=_container,
)
