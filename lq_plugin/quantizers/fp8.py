"""FP8 as quantizers: E4M3 or E5M2 under a float scale, from statistics or from the tensor at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lq_plugin.functional.fixed_levels import FixedLevels, TableLevels
from lq_plugin.functional.fp8 import ELEMENTS, fake_quantize_fp8, fp8_scale
from lq_plugin.functional.grouping import has_row_scales
from lq_plugin.functional.minifloat import Minifloat, minifloat_codes, minifloat_values, signed_values
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import PerBlock, PerGroup, QuantSpec
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.base import Levels
from lq_plugin.quantizers.dynamic import DynamicActivationQuantizer
from lq_plugin.quantizers.integer import onnx_scale
from lq_plugin.quantizers.registry import FloatContainer, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.weight import WeightQuantizer


def fp8_element(spec: QuantSpec) -> Minifloat:
    """Returns the element format of an FP8 spec, E4M3 unless it says `fp8:e5m2`."""
    return ELEMENTS[next(iter(spec.format_options), "e4m3")]


class FP8:
    """Bounds, scales and values of FP8, for any quantizer (see `lq_plugin.functional.fp8`)."""

    spec: QuantSpec

    def bounds_to_qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scale of bounds, and zeros: there is no zero point."""
        scale = fp8_scale(minimum, maximum, fp8_element(self.spec))
        return scale, torch.zeros_like(scale)

    def rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Returns `x` cast under a scale, with the straight-through gradient.

        Args:
            x: float.
            scale: broadcastable to `x`.
            zero_point: not used.
        """
        return fake_quantize_fp8(x, scale, fp8_element(self.spec))


def _levels(quantizer: Any, scale: Tensor) -> Levels:
    element = fp8_element(quantizer.spec)
    return Levels(-element.max_value * scale, element.max_value * scale, element.largest_step * scale)


class FP8WeightQuantizer(FP8, WeightQuantizer):
    """Weights in FP8; a `minmax` range follows the weight, `percentile` is estimated."""

    def levels(self, x: Tensor | None = None) -> Levels:
        return _levels(self, self.qparams(x)[0])

    @property
    def has_fixed_levels(self) -> bool:
        return True

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        scale, zero_point = (t.detach().clone() for t in self.qparams(w))
        return TableLevels(scale, zero_point, True, signed_values(fp8_element(self.spec)))

    def _rows_are_independent(self) -> bool:
        return has_row_scales(self.spec.granularity)


class FP8ActivationQuantizer(FP8, ActivationQuantizer):
    """Activations in FP8 with a range that is fixed before the forward pass, by calibration or EMA."""

    def levels(self, x: Tensor | None = None) -> Levels:
        scale, _ = self.qparams()
        return _levels(self, scale if x is None else self.broadcastable(scale, x))


class FP8DynamicQuantizer(FP8, DynamicActivationQuantizer):
    """Activations in FP8 with the range of the present tensor."""

    def levels(self, x: Tensor | None = None) -> Levels | None:
        if x is None or isinstance(self.spec.granularity, PerGroup):
            return None
        return _levels(self, self.qparams(x)[0])


def fp8_activation(spec: QuantSpec, name: str, channels: int, channel_axis: int) -> ActivationQuantizer:
    """Returns the quantizer of an FP8 activation, by its range.

    Args:
        spec: of the activation.
        name: for messages.
        channels: size of the channel axis.
        channel_axis: axis of the channels.
    """
    return (FP8DynamicQuantizer if spec.dynamic else FP8ActivationQuantizer)(spec, name, channels, channel_axis)


def _statistics(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    return (quantizer.qparams(w)[0],)


def _encode(quantizer: WeightQuantizer, w: Tensor, scale: Tensor) -> Parts:
    return {"codes": Part(minifloat_codes(w / scale, fp8_element(quantizer.spec)), 8), "scale": Part(scale)}


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    return minifloat_values(parts["codes"], fp8_element(spec)) * parts["scale"]


def _container(spec: QuantSpec, values: Values) -> FloatContainer:
    codes, scale = values["codes"], values["scale"]
    if isinstance(spec.granularity, PerBlock):
        # `[O / b, 1, I / b, 1, 1...]` to one for each row of a square and each kernel position.
        size, kernel = spec.granularity.size, codes.shape[2:]
        rows = scale.squeeze(3).squeeze(1).repeat_interleave(size, 0)[: codes.shape[0]]
        return FloatContainer(codes, fp8_element(spec), rows.expand(*rows.shape[:2], *kernel), block=size)
    scale, block = onnx_scale(spec, scale)
    return FloatContainer(codes, fp8_element(spec), scale, block=block)


register_format(
    "fp8",
    FORMATS["fp8"],
    weight=FP8WeightQuantizer,
    activation=fp8_activation,
    storage=Storage(_encode, _decode, _statistics),
    onnx=_container,
    default_options="e4m3",
)
