"""OCP MX and NVFP4 as quantizers: small floating point elements under a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.functional.affine import extremes
from lq_plugin.functional.block_kernel import fake_quantize_blocks, nvfp4_rule, ocp_rule
from lq_plugin.functional.fixed_levels import FixedLevels, TableLevels
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.lookup import Reading, read_rows
from lq_plugin.functional.minifloat import (
    E2M1,
    E3M2,
    E4M3,
    Minifloat,
    fake_quantize_minifloat,
    minifloat_codes,
    minifloat_values,
    round_to_minifloat,
    signed_values,
)
from lq_plugin.functional.nvfp4 import Target, fake_quantize_nvfp4, nvfp4_scales, nvfp4_tensor_scale
from lq_plugin.functional.ocp_mx import ELEMENTS, ScaleMode, fake_quantize_mx, mx_scale, power_of_two
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.native.kernels import BlockRule
from lq_plugin.quantizers.base import Levels, float32
from lq_plugin.quantizers.registry import FloatContainer, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.vector import VectorActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer


def element_and_mode(spec: QuantSpec) -> tuple[Minifloat, ScaleMode]:
    """Returns element format and scale mode of an OCP MX spec, by default the specification's `floor`."""
    return ELEMENTS[spec.format_name], cast(ScaleMode, next(iter(spec.format_options), "floor"))


def nvfp4_target(spec: QuantSpec) -> Target:
    """Returns what the largest magnitude of a block is mapped to, by default `max`: to 6."""
    return cast(Target, next((word for word in spec.format_options if word != "unit"), "max"))


def nvfp4_scale_above(spec: QuantSpec, amax: Tensor) -> Tensor:
    """Returns the scale above those of the blocks for a tensor's largest magnitude: 1 under `nvfp4:unit`."""
    return torch.ones_like(amax) if "unit" in spec.format_options else nvfp4_tensor_scale(amax, nvfp4_target(spec))


class BlockWeightQuantizer(WeightQuantizer):
    """Weight quantizer whose scales follow from the weight at each call, until they are fixed."""

    element: Minifloat

    def block_scale(self, w: Tensor) -> Tensor:
        """Returns the scale of each of the weight's blocks, broadcastable to them."""
        raise NotImplementedError

    def quantize_blocks(self, w: Tensor) -> Tensor:
        """Returns fake-quantized blocks."""
        raise NotImplementedError

    def block_rule(self, w: Tensor) -> BlockRule:
        """Returns the same computation as a rule for the kernels."""
        raise NotImplementedError

    def live_qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.block_scale(x)
        return scale, torch.zeros_like(scale)

    @property
    def has_fixed_levels(self) -> bool:
        return True

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        scale, zero_point = (t.detach().clone() for t in self.qparams(w))
        return TableLevels(scale, zero_point, False, signed_values(self.element))

    def levels(self, x: Tensor | None = None) -> Levels:
        scale, _ = self.qparams(x)
        return Levels(
            -self.element.max_value * scale, self.element.max_value * scale, self.element.largest_step * scale
        )

    def quantize_values(self, x: Tensor) -> Tensor:
        if self._fixed:
            w = blocks(x, self.spec.granularity)
            y = fake_quantize_minifloat(w, self.scale, self.scale.reciprocal(), self.element)
            return unblocks(y, x.shape, self.spec.granularity)
        done = fake_quantize_blocks(x, 1, lambda: self.block_rule(x), self.result_dtype(x))
        if done is not None:
            return done
        return unblocks(self.quantize_blocks(blocks(x, self.spec.granularity)), x.shape, self.spec.granularity)


class OCPWeightQuantizer(BlockWeightQuantizer):
    """Weights in MXFP8, MXFP6, MXFP4 or MXINT8 (see `lq_plugin.functional.ocp_mx`)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.element, self.mode = element_and_mode(self.spec)

    def block_scale(self, w: Tensor) -> Tensor:
        return mx_scale(w, self.element, self.mode)

    def quantize_blocks(self, w: Tensor) -> Tensor:
        return fake_quantize_mx(w, self.element, self.mode)

    def block_rule(self, w: Tensor) -> BlockRule:
        return ocp_rule(self.element, self.mode)

    def _rows_are_independent(self) -> bool:
        return not self.is_fixed

    def quantize_rows(self, weight: Tensor, index: Tensor, reading: Reading) -> Tensor:
        return self.quantize_values(read_rows(weight, index.reshape(-1), reading)).view(*index.shape, -1)


@dataclass(frozen=True)
class NVFP4Levels(TableLevels):
    """E2M1 under s · g.

    Args:
        tensor_scale: g.
    """

    tensor_scale: Tensor


class NVFP4WeightQuantizer(BlockWeightQuantizer):
    """Weights in NVFP4 (see `lq_plugin.functional.nvfp4`)."""

    element = E2M1
    #: g of fixed scales, of which `scale` is s · g.
    tensor_scale: Tensor
    fixed_buffers: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "tensor_scale")

    def make_qparams(self) -> None:
        super().make_qparams()
        self.register_buffer("tensor_scale", float32(1.0, (1,)), persistent=False)

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        levels = super().fixed_levels(w)
        above = self.tensor_scale.clone() if self.is_fixed else self._above(w).reshape(1)
        return NVFP4Levels(levels.scale, levels.zero_point, False, signed_values(E2M1), above)

    def keep_levels(self, levels: FixedLevels) -> None:
        super().keep_levels(levels)
        with torch.no_grad():
            self.tensor_scale.copy_(cast(NVFP4Levels, levels).tensor_scale)

    def stored_scales(self) -> tuple[Tensor, Tensor]:
        """Returns g and s of fixed scales.

        Raises:
            ExportError: the scales are no products of E4M3 numbers and g.
        """
        block = round_to_minifloat(self.scale / self.tensor_scale, E4M3)
        if not torch.equal(block * self.tensor_scale, self.scale):
            raise ExportError(f"{self.name}: its fixed scales are no E4M3 numbers times one float; calibrate it again")
        return self.tensor_scale, block

    def block_scale(self, w: Tensor) -> Tensor:
        scale, tensor_scale = nvfp4_scales(w, self._above(w), nvfp4_target(self.spec))
        return scale * tensor_scale

    def quantize_blocks(self, w: Tensor) -> Tensor:
        return fake_quantize_nvfp4(w, self._above(w), nvfp4_target(self.spec))

    def block_rule(self, w: Tensor) -> BlockRule:
        return nvfp4_rule(self._above(w).item(), nvfp4_target(self.spec))

    def _above(self, w: Tensor) -> Tensor:
        low, high = extremes(w.detach(), (1,) * w.ndim)
        return nvfp4_scale_above(self.spec, torch.maximum(-low, high).float().reshape(()))


class OCPActivationQuantizer(VectorActivationQuantizer):
    """Activations in MXFP8, MXFP6, MXFP4 or MXINT8, blocks along the channels."""

    needs_calibration = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.element, self.mode = element_and_mode(self.spec)

    def rounded_vectors(self, vectors: Tensor) -> Tensor:
        return fake_quantize_mx(vectors, self.element, self.mode)

    def block_rule(self) -> BlockRule:
        return ocp_rule(self.element, self.mode)

    def levels(self, x: Tensor | None = None) -> None:
        return None


class NVFP4ActivationQuantizer(VectorActivationQuantizer):
    """Activations in NVFP4, with a calibrated scale of the tensor: a sample's result does not depend on its batch."""

    def rounded_vectors(self, vectors: Tensor) -> Tensor:
        return fake_quantize_nvfp4(vectors, self.scale, nvfp4_target(self.spec))

    def block_rule(self) -> BlockRule | None:
        return nvfp4_rule(self.scale.item(), nvfp4_target(self.spec))

    def levels(self, x: Tensor | None = None) -> None:
        return None

    def store_bounds(self, minimum: Tensor, maximum: Tensor) -> None:
        with torch.no_grad():
            self.scale.copy_(nvfp4_scale_above(self.spec, torch.maximum(-minimum, maximum)))


def _ocp_statistics(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    return (quantizer.qparams()[0],) if quantizer.is_fixed else ()


def _encode_ocp(quantizer: WeightQuantizer, w: Tensor, *fixed: Tensor) -> Parts:
    element, mode = element_and_mode(quantizer.spec)
    scale = fixed[0] if fixed else mx_scale(w, element, mode)
    codes = minifloat_codes(w * scale.reciprocal(), element)
    return {"codes": Part(codes, element.bit_width), "exponent": Part(torch.frexp(scale).exponent + 126, 8)}


def _decode_ocp(spec: QuantSpec, parts: Values) -> Tensor:
    return minifloat_values(parts["codes"], ELEMENTS[spec.format_name]) * power_of_two(parts["exponent"] - 127)


def _ocp_container(spec: QuantSpec, values: Values) -> FloatContainer:
    element, codes = ELEMENTS[spec.format_name], values["codes"]
    scale = power_of_two(values["exponent"] - 127).squeeze(2)
    if element == E3M2:  # 10 bits as integers; E4M3 has all of its values
        element, codes = E4M3, minifloat_codes(minifloat_values(codes, E3M2), E4M3)
    return FloatContainer(codes, element, scale, "E8M0", block=32)


def _nvfp4_statistics(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    if quantizer.is_fixed:
        return cast(NVFP4WeightQuantizer, quantizer).stored_scales()
    return (nvfp4_scale_above(quantizer.spec, torch.maximum(w.amax(), -w.amin())).reshape(1),)


def _encode_nvfp4(quantizer: WeightQuantizer, w: Tensor, tensor_scale: Tensor, *fixed: Tensor) -> Parts:
    block = fixed[0] if fixed else nvfp4_scales(w, tensor_scale, nvfp4_target(quantizer.spec))[0]
    codes = minifloat_codes(w * (tensor_scale.reciprocal() / block), E2M1)
    return {
        "codes": Part(codes, 4),
        "scale": Part(minifloat_codes(block, E4M3), 8),
        "tensor_scale": Part(tensor_scale),
    }


def _decode_nvfp4(spec: QuantSpec, parts: Values) -> Tensor:
    return minifloat_values(parts["codes"], E2M1) * (minifloat_values(parts["scale"], E4M3) * parts["tensor_scale"])


def _nvfp4_container(spec: QuantSpec, values: Values) -> FloatContainer:
    scale = minifloat_values(values["scale"], E4M3).squeeze(2)
    return FloatContainer(values["codes"], E2M1, scale, "E4M3", values["tensor_scale"].reshape(()), block=16)


for _name in ELEMENTS:
    register_format(
        _name,
        FORMATS[_name],
        weight=OCPWeightQuantizer,
        activation=OCPActivationQuantizer,
        storage=Storage(_encode_ocp, _decode_ocp, _ocp_statistics),
        onnx=_ocp_container,
        default_options="floor",
    )
register_format(
    "nvfp4",
    FORMATS["nvfp4"],
    weight=NVFP4WeightQuantizer,
    activation=NVFP4ActivationQuantizer,
    storage=Storage(_encode_nvfp4, _decode_nvfp4, _nvfp4_statistics),
    onnx=_nvfp4_container,
    default_options="max",
)
