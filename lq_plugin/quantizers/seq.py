"""SEQ weights: four or three levels spread evenly over a range, whose end is learned or found by statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.fixed_levels import FixedLevels, TableLevels
from lq_plugin.functional.grouping import blocks, to_rows, unblocks
from lq_plugin.functional.seq import FOUR, THREE, best_scale, fake_quantize_seq, seq_levels, seq_step
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.base import Levels, float32
from lq_plugin.quantizers.integer import onnx_scale
from lq_plugin.quantizers.registry import Container, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.weight import WeightQuantizer
from lq_plugin.ranges import Sample


def level_count(spec: QuantSpec) -> int:
    """Returns the number of levels: four, or three of `seq:ternary`."""
    return THREE if "ternary" in spec.format_options else FOUR


@dataclass(frozen=True)
class SEQLevels(TableLevels):
    """SEQ's levels in steps: the scale is α."""

    @property
    def step(self) -> Tensor:
        return seq_step(self.scale, len(self.table))


class SEQWeightQuantizer(WeightQuantizer):
    """Weights on SEQ's levels (`lq_plugin.functional.seq`): α is max|w| at each call, or with `mse` the best one."""

    def bounds_to_qparams(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.maximum(-minimum.float(), maximum.float()).clamp(min=MIN_SCALE)
        return scale, torch.zeros_like(scale)

    def rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return fake_quantize_seq(x, scale, level_count(self.spec))

    def levels(self, x: Tensor | None = None) -> Levels:
        scale, count = self.qparams(x)[0], level_count(self.spec)
        step = seq_step(scale, count)
        top = step * ((count - 1) / 2)
        return Levels(-top, top, step)

    @property
    def has_fixed_levels(self) -> bool:
        return True

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        scale, zero_point = (t.detach().clone() for t in self.qparams(w))
        count = level_count(self.spec)
        return SEQLevels(scale, zero_point, True, torch.arange(count, dtype=torch.float32) - (count - 1) / 2)

    def calibrate(self, weight: Tensor) -> None:
        super().calibrate(weight)  # checks for NaN and Inf
        if self.live or self.is_fixed:
            return
        rows = to_rows(blocks(weight.detach().float(), self.spec.granularity), self.scale_shape)
        number = self.counts(weight.device)
        found = best_scale(rows, level_count(self.spec), None if number is None else number.flatten())
        with torch.no_grad():
            self.scale.copy_(found.clamp(min=MIN_SCALE).reshape(self.scale_shape))

    def load_sample(self, sample: Sample) -> None:
        self.set_calibrated()


class SEQLearnedWeightQuantizer(SEQWeightQuantizer):
    """SEQ with a trained α; it starts as the one with the least squared error."""

    no_weight_decay = ("scale",)

    def make_qparams(self) -> None:
        self.scale = nn.Parameter(float32(1.0, self.scale_shape))
        self.register_buffer("zero_point", float32(0.0, self.scale_shape), persistent=False)
        self.gradient_factor = (torch.Size(self.shape).numel() / max(self.scale.numel(), 1)) ** -0.5

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # An update through zero stays valid.
        return self.scale.detach().abs().clamp(min=MIN_SCALE), self.zero_point

    def quantize_values(self, x: Tensor) -> Tensor:
        group, scale = self.spec.granularity, self.scale.abs().clamp(min=MIN_SCALE)
        y = fake_quantize_seq(blocks(x, group), scale, level_count(self.spec), self.gradient_factor)
        return unblocks(y, x.shape, group)


def seq_weight(spec: QuantSpec, name: str, shape: tuple[int, ...]) -> WeightQuantizer:
    """Returns the quantizer of a SEQ weight, by its range.

    Args:
        spec: of the weight.
        name: for messages.
        shape: of the weight.
    """
    return (SEQLearnedWeightQuantizer if spec.range_name == "lsq" else SEQWeightQuantizer)(spec, name, shape)


def _statistics(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    return (quantizer.qparams(w)[0],)


def _encode(quantizer: WeightQuantizer, w: Tensor, scale: Tensor) -> Parts:
    count = level_count(quantizer.spec)
    codes = seq_levels(w, scale, count).add_((count - 1) / 2).to(torch.int32)
    return {"codes": Part(codes, 2), "scale": Part(scale)}


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    count = level_count(spec)
    return (parts["codes"] - (count - 1) / 2) * seq_step(parts["scale"], count)


def _container(spec: QuantSpec, values: Values) -> Container:
    """Returns -3, -1, 1, 3 under half a step as INT4; three levels as INT2."""
    count = level_count(spec)
    scale, block = onnx_scale(spec, seq_step(values["scale"], count))
    if count == THREE:
        return Container(values["codes"] - 1, 2, True, scale, block=block)
    return Container(2 * values["codes"] - 3, 4, True, scale / 2, block=block)


register_format(
    "seq",
    FORMATS["seq"],
    weight=seq_weight,
    storage=Storage(_encode, _decode, _statistics, finite_codes=True),
    onnx=_container,
)
