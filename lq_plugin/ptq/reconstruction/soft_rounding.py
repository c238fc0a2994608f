"""Stand-ins for a layer's quantizers while its rounding is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lq_plugin.functional.adaround import inverse_rectified_sigmoid, neighbours, rectified_sigmoid, undecided
from lq_plugin.functional.affine import bounds_from_qparams
from lq_plugin.functional.grouping import block_mask, blocks, unblocks
from lq_plugin.functional.lsq import fake_quantize_learned
from lq_plugin.intent.spec import PerGroup
from lq_plugin.quantizers import ActivationQuantizer, WeightQuantizer

#: Learned scales stay within these multiples of the calibrated ones.
GAIN_BOUNDS = (0.25, 4.0)


class SoftRounding(nn.Module):
    """In the place of a weight quantizer: ŵ = g · s · (low + (high - low) · h(V)).

    Args:
        quantizer: whose qparams and grid hold.
        weight: canonical, `[C_out, C_in, *kernel]`.
        learn_scale: g is trained, one for each scale; else it is 1. Integer scales (VS-Quant) and those of
            a format of its own are never trained.
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, learn_scale: bool = False) -> None:
        super().__init__()
        self.name = quantizer.name
        self.shape, self.granularity = quantizer.shape, quantizer.spec.granularity
        w = blocks(weight.detach().float(), self.granularity)
        scale, zero_point = quantizer.qparams(w)
        self.scale, self.zero_point = scale.detach().clone(), zero_point.detach().clone()
        self.low, high, fraction = neighbours(w, self.scale, self.zero_point, quantizer.spec.grid)
        self.span = high - self.low
        self.free = self.span > 0
        mask = block_mask(self.shape, self.granularity)
        if mask is not None:
            self.free &= mask.to(w.device)
        self.v = nn.Parameter(inverse_rectified_sigmoid(fraction))
        integers = isinstance(self.granularity, PerGroup) and self.granularity.scale_bits is not None
        trained = learn_scale and not integers and quantizer.spec.has_free_scales
        self.gain = nn.Parameter(torch.ones_like(self.scale)) if trained else None

    def forward(self, weight: Tensor) -> Tensor:
        return unblocks(self._step() * (self.low + self.span * self.h()), self.shape, self.granularity).to(weight.dtype)

    def h(self) -> Tensor:
        """The share each weight is rounded up by, 0..1."""
        return rectified_sigmoid(self.v)

    def _step(self) -> Tensor:
        return self.scale if self.gain is None else self.scale * self.gain.clamp(*GAIN_BOUNDS)

    @torch.no_grad()
    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight on the grid (canonical, float32), scale and zero point."""
        scale = self._step()
        levels = self.low + self.span * (self.h() >= 0.5)
        return unblocks(levels * scale, self.shape, self.granularity), scale.clone(), self.zero_point

    @torch.no_grad()
    def undecided_share(self) -> float:
        """Share of the weights with a choice that have not made it."""
        return float((undecided(self.h()) & self.free).sum() / self.free.sum().clamp(min=1))


class SoftInput(nn.Module):
    """In the place of an input quantizer: its scale may be trained, and it may let values pass at random.

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
            scale, zero_point = quantizer._view(self._scale(), x), quantizer._view(quantizer.zero_point, x)
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
        """Give the quantizer the trained scale."""
        quantizer = self.held[0]
        if self.gain is None:
            return
        quantizer.scale.copy_(self._scale())
        if quantizer.moving:
            minimum, maximum = bounds_from_qparams(quantizer.scale, quantizer.zero_point, quantizer.spec.grid)
            quantizer.running_min.copy_(minimum)
            quantizer.running_max.copy_(maximum)
