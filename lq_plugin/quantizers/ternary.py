"""Ternary weights: TWN and TTQ."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from lq_plugin.functional import ttq, twn
from lq_plugin.functional.affine import MIN_SCALE, extremes
from lq_plugin.functional.fixed_levels import FixedLevels, TableLevels
from lq_plugin.functional.grouping import blocks, to_rows, unblocks
from lq_plugin.functional.twn import ternary_signs
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import PerChannel, PerTensor, QuantSpec
from lq_plugin.quantizers.base import Levels, float32
from lq_plugin.quantizers.integer import onnx_scale
from lq_plugin.quantizers.registry import Container, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.weight import WeightQuantizer
from lq_plugin.ranges import Sample


class TWNWeightQuantizer(WeightQuantizer):
    """Weights of -α, 0, +α; threshold and scale follow the weight (see `lq_plugin.functional.twn`)."""

    @cached_property
    def factor(self) -> float | None:
        """Δ over the mean magnitude; None: Δ is the exact one."""
        words = self.spec.format_options
        return None if "exact" in words else float(words[0]) if words else twn.THRESHOLD

    def threshold_and_scale(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Δ and α of the weight's blocks, broadcastable to them; Δ = α / 2 where α is fixed."""
        if self._fixed:
            return self.scale / 2, self.scale
        rows = to_rows(w.detach(), self.scale_shape)
        if self.factor is None:
            threshold = twn.exact_threshold(rows)
        else:
            count = self.counts(w.device)
            threshold = twn.approximate_threshold(rows, self.factor, None if count is None else count.flatten())
        return threshold.reshape(self.scale_shape), twn.ternary_scale(rows, threshold).reshape(self.scale_shape)

    def live_qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, scale = self.threshold_and_scale(x)
        return scale, torch.zeros_like(scale)

    @property
    def has_fixed_levels(self) -> bool:
        return True

    def fixed_levels(self, w: Tensor) -> FixedLevels:
        # A row of zeros has the scale 0, by which nothing can be divided.
        scale = self.qparams(w)[0].detach().clamp(min=MIN_SCALE)
        return TableLevels(scale, torch.zeros_like(scale), True, torch.tensor([-1.0, 0.0, 1.0]))

    def levels(self, x: Tensor | None = None) -> Levels:
        scale, _ = self.qparams(x)
        return Levels(-scale, scale, scale)

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        return unblocks(twn.ternarize(w, *self.threshold_and_scale(w)), self.shape, self.spec.granularity)


class TTQWeightQuantizer(WeightQuantizer):
    """Weights of -Wn, 0, +Wp with trained scales (see `lq_plugin.functional.ttq`).

    They start as TWN's scale of the weights on their side: the paper's start, 1, is far from the size of a weight.
    Their gradients are divided by the square root of the number of weights they sum over, so that the learning rate
    of the weights suits them.
    """

    no_weight_decay = ("positive", "negative")

    def make_qparams(self) -> None:
        self.needs_calibration = True
        self.positive = nn.Parameter(float32(1.0, self.scale_shape))
        self.negative = nn.Parameter(float32(1.0, self.scale_shape))
        words = self.spec.format_options
        self.factor = float(words[0]) if words else ttq.THRESHOLD
        self.gradient_factor = (torch.Size(self.shape).numel() / self.positive.numel()) ** -0.5

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        positive, negative = self.scales()
        return torch.maximum(positive, negative), torch.zeros_like(positive)

    def scales(self) -> tuple[Tensor, Tensor]:
        """Returns Wp and Wn."""
        return self.positive.detach(), self.negative.detach()

    def levels(self, x: Tensor | None = None) -> Levels:
        positive, negative = self.scales()
        return Levels(-negative, positive, torch.maximum(positive, negative))

    def threshold(self, w: Tensor) -> Tensor:
        """Returns Δ of the weight's blocks."""
        low, high = extremes(w, self.scale_shape)
        return self.factor * torch.maximum(-low, high).float()

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        y = ttq.ternarize_learned(
            w, self.threshold(w), self.positive, self.negative, self.gradient_factor, self.result_dtype(x)
        )
        return unblocks(y, self.shape, self.spec.granularity)

    def calibrate(self, weight: Tensor) -> None:
        super().calibrate(weight)  # checks for NaN and Inf
        rows = to_rows(blocks(weight.detach(), self.spec.granularity).float(), self.scale_shape)
        threshold = self.threshold(blocks(weight, self.spec.granularity)).reshape(-1)
        for scale, side in ((self.positive, rows), (self.negative, -rows)):
            found = twn.ternary_scale(side.clamp(min=0), threshold)
            with torch.no_grad():
                scale.copy_(found.clamp(min=MIN_SCALE).reshape(self.scale_shape))

    def load_sample(self, sample: Sample) -> None:
        self.set_calibrated()


def _encode_twn(quantizer: TWNWeightQuantizer, w: Tensor, threshold: Tensor, scale: Tensor) -> Parts:
    return {"codes": Part(ternary_signs(w, threshold).to(torch.int32) + 1, 2), "scale": Part(scale)}


def _decode_twn(spec: QuantSpec, parts: Values) -> Tensor:
    return (parts["codes"] - 1) * parts["scale"]


def _twn_container(spec: QuantSpec, values: Values) -> Container:
    scale, block = onnx_scale(spec, values["scale"])
    return Container(values["codes"] - 1, 2, True, scale, block=block)


def _ttq_statistics(quantizer: TTQWeightQuantizer, w: Tensor) -> Statistics:
    return quantizer.threshold(w), *quantizer.scales()


def _encode_ttq(
    quantizer: TTQWeightQuantizer, w: Tensor, threshold: Tensor, positive: Tensor, negative: Tensor
) -> Parts:
    codes = ternary_signs(w, threshold).to(torch.int32) + 1
    return {"codes": Part(codes, 2), "positive": Part(positive), "negative": Part(negative)}


def _decode_ttq(spec: QuantSpec, parts: Values) -> Tensor:
    signs = parts["codes"] - 1
    return torch.where(signs > 0, parts["positive"], torch.where(signs < 0, -parts["negative"], 0.0))


def _ttq_container(spec: QuantSpec, values: Values) -> Container:
    table = torch.cat([-values["negative"].reshape(1), torch.zeros(1), values["positive"].reshape(1)])
    return Container(values["codes"], 8, False, table=table)


def no_table(spec: QuantSpec, channels: int) -> str | None:
    """Returns the reason why ONNX cannot hold a weight of several tables, or None where it has one."""
    if isinstance(spec.granularity, PerTensor) or (channels == 1 and isinstance(spec.granularity, PerChannel)):
        return None
    return "ONNX has no tables for single channels; use the packed file, or another format"


register_format(
    "twn",
    FORMATS["twn"],
    weight=TWNWeightQuantizer,
    storage=Storage(_encode_twn, _decode_twn, lambda quantizer, w: quantizer.threshold_and_scale(w)),
    onnx=_twn_container,
    default_options=f"{twn.THRESHOLD:g}",
)
register_format(
    "ttq",
    FORMATS["ttq"],
    weight=TTQWeightQuantizer,
    storage=Storage(_encode_ttq, _decode_ttq, _ttq_statistics),
    onnx=_ttq_container,
    onnx_fault=no_table,
    default_options=f"{ttq.THRESHOLD:g}",
)
