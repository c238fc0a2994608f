"""Ternary weights: TWN and TTQ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lq_plugin.functional import ttq, twn
from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.grouping import blocks, reduced_dims, to_rows, unblocks
from lq_plugin.quantizers.base import Levels, float32
from lq_plugin.quantizers.weight import WeightQuantizer
from lq_plugin.ranges import Sample


class TWNWeightQuantizer(WeightQuantizer):
    """-α, 0, +α, threshold and scale found anew from the weight at each call (see `lq_plugin.functional.twn`)."""

    def threshold_and_scale(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Δ and α of the weight's blocks, broadcastable to them."""
        rows = to_rows(w.detach(), self.scale_shape)
        words = self.spec.format_options
        if "exact" in words:
            threshold = twn.exact_threshold(rows)
        else:
            count = self.counts(w.device)
            factor = float(words[0]) if words else twn.THRESHOLD
            threshold = twn.approximate_threshold(rows, factor, None if count is None else count.flatten())
        return threshold.reshape(self.scale_shape), twn.ternary_scale(rows, threshold).reshape(self.scale_shape)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x is None:
            raise ValueError(f"{self.name}: the scales of {self.spec} follow the weight; pass its blocks to qparams")
        _, scale = self.threshold_and_scale(x)
        return scale, torch.zeros_like(scale)

    def levels(self, x: Tensor | None = None) -> Levels:
        scale, _ = self.qparams(x)
        return Levels(-scale, scale, scale)

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        return unblocks(twn.ternarize(w, *self.threshold_and_scale(w)), self.shape, self.spec.granularity)


class TTQWeightQuantizer(WeightQuantizer):
    """-Wn, 0, +Wp with trained scales (see `lq_plugin.functional.ttq`).

    They start as TWN's scale of the weights on their side: the paper's start, 1, is far from the size of a weight.
    Their gradients are divided by the square root of the number of weights they sum over, so that the learning rate
    of the weights suits them.
    """

    no_weight_decay = ("positive", "negative")

    def _make_qparams(self) -> None:
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
        """Wp and Wn."""
        return self.positive.detach(), self.negative.detach()

    def levels(self, x: Tensor | None = None) -> Levels:
        positive, negative = self.scales()
        return Levels(-negative, positive, torch.maximum(positive, negative))

    def threshold(self, w: Tensor) -> Tensor:
        """Δ of the weight's blocks."""
        return self.factor * w.detach().float().abs().amax(reduced_dims(self.scale_shape), keepdim=True)

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        y = ttq.ternarize_learned(w, self.threshold(w), self.positive, self.negative, self.gradient_factor)
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
