"""Stand-ins for a layer's quantizers while its rounding is learned."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lq_plugin.functional.adaround import inverse_rectified_sigmoid, rectified_sigmoid, undecided
from lq_plugin.functional.affine import bounds_from_qparams
from lq_plugin.functional.fixed_levels import FixedLevels
from lq_plugin.functional.grouping import block_mask, blocks, unblocks
from lq_plugin.functional.lsq import fake_quantize_learned
from lq_plugin.layers import QuantizedLayer
from lq_plugin.ptq.layerwise.write import rounding_fault
from lq_plugin.quantizers import ActivationQuantizer, WeightQuantizer

#: Learned scales stay within these multiples of the calibrated ones.
GAIN_BOUNDS = (0.25, 4.0)


class SoftRounding(nn.Module):
    """Stand-in for a weight quantizer: ŵ = g · s · (low + (high - low) · h(V)), with the levels next to a weight.

    Args:
        quantizer: one that has fixed levels.
        weight: canonical, `[C_out, C_in, *kernel]`.
        learn_scale: g is trained, one for each scale; else it is 1. Integer scales (VS-Quant) and those of block
            formats are never trained.
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, learn_scale: bool = False) -> None:
        super().__init__()
        self.name = quantizer.name
        self.shape, self.granularity = quantizer.shape, quantizer.spec.granularity
        w = blocks(weight.detach().float(), self.granularity)
        self.levels = quantizer.fixed_levels(w)
        self.low, high, fraction = self.levels.neighbours(w)
        self.span = high - self.low
        self.free = self.span > 0
        mask = block_mask(self.shape, self.granularity)
        if mask is not None:
            self.free &= mask.to(w.device)
        self.v = nn.Parameter(inverse_rectified_sigmoid(fraction))
        trained = learn_scale and self.levels.trainable
        self.gain = nn.Parameter(torch.ones_like(self.levels.scale)) if trained else None

    @staticmethod
    def fault(layer: QuantizedLayer) -> str | None:
        """Returns why the rounding of a layer's weight cannot be learned; None when it can."""
        return rounding_fault(layer)

    def forward(self, weight: Tensor) -> Tensor:
        return unblocks(self._trained().step * (self.low + self.span * self.h()), self.shape, self.granularity).to(
            weight.dtype
        )

    def h(self) -> Tensor:
        """The share each weight is rounded up by, 0..1."""
        return rectified_sigmoid(self.v)

    def _trained(self) -> FixedLevels:
        if self.gain is None:
            return self.levels
        return replace(self.levels, scale=self.levels.scale * self.gain.clamp(*GAIN_BOUNDS))

    @torch.no_grad()
    def rounded(self) -> tuple[Tensor, FixedLevels]:
        """Weight on the levels (canonical, float32), and the levels."""
        levels = self._trained()
        chosen = torch.where(self.h() >= 0.5, self.low + self.span, self.low)
        return unblocks(chosen * levels.step, self.shape, self.granularity), levels

    @torch.no_grad()
    def undecided_share(self) -> float:
        """Share of the weights with a choice that have not made it."""
        return float((undecided(self.h()) & self.free).sum() / self.free.sum().clamp(min=1))


class SoftInput(nn.Module):
    """Stand-in for an input quantizer: its scale may be trained, and it may let values pass at random.

    Args:
        quantizer: a calibrated one.
        learn_scale: train one factor for each scale.
        drop: probability that an element stays float (QDrop, Wei et al., ICLR 2022, arXiv 2203.05740).
        generator: of the random choice.
    """

    def __init__(
        self, quantizer: ActivationQuantizer, learn_scale: bool, drop: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        # In a list: it is no part of this module's parameters.
        self.held = [quantizer]
        self.name = quantizer.name
        self.drop, self.generator = drop, generator
        plain = type(quantizer) is ActivationQuantizer
        self.gain = nn.Parameter(torch.ones_like(quantizer.scale)) if learn_scale and plain else None

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.held[0]
        y: Tensor
        if self.gain is None:
            y = quantizer(x)
        else:
            scale, zero_point = (
                quantizer.broadcastable(self._scale(), x),
                quantizer.broadcastable(quantizer.zero_point, x),
            )
            y = fake_quantize_learned(x, scale, zero_point, quantizer.spec.grid)
        if self.drop and torch.is_grad_enabled():
            kept = torch.rand(x.shape, generator=self.generator, device=self.generator.device).to(x.device) < self.drop
            y = torch.where(kept, x, y)
        return y

    def _scale(self) -> Tensor:
        assert self.gain is not None
        return self.held[0].scale * self.gain.clamp(*GAIN_BOUNDS)

    @torch.no_grad()
    def write_back(self) -> None:
        """Gives the quantizer the trained scale."""
        quantizer = self.held[0]
        if self.gain is None:
            return
        quantizer.scale.copy_(self._scale())
        if quantizer.moving:
            minimum, maximum = bounds_from_qparams(quantizer.scale, quantizer.zero_point, quantizer.spec.grid)
            quantizer.running_min.copy_(minimum)
            quantizer.running_max.copy_(maximum)
