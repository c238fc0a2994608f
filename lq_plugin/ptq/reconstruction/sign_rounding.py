"""SignRound: an offset of each weight before it is rounded, and the ends of its range, by signed gradients.

With the calibrated range lo..hi of the weights that share a scale, one V for each weight and α, β for each scale::

    s = (α hi - β lo) / (p - n),   z = n - round(β lo / s)
    ŵ = s · (clip(round(w / s + z + V), n, p) - z)
    V ∈ -1/2..1/2,   α, β ∈ 0..1

Without zero point s is α times the calibrated one. Rounding passes gradients straight through. V starts at 0, α and β
at 1, so that nothing changes at first. Each of T steps takes (1 - t / T) / T times the sign of the gradient off them;
what had the smallest error is kept (algorithm 1). Ranges only shrink: take those of the extremes (`minmax`).

Reference: Cheng, Zhang, Shen, Cai, He, Lv, Liu, "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs", Findings of EMNLP 2024 (arXiv 2309.05516), section 3. Biases and scales of
inputs, which it leaves alone, are trained beside by Adam, as with AdaRound, where their learning rates are not 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lq_plugin.functional.affine import MIN_SCALE, bounds_from_qparams
from lq_plugin.functional.fixed_levels import FixedLevels, IntegerLevels
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.lsq import fake_quantize_learned
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.layers import QuantizedLayer, current_weight_quantizer
from lq_plugin.ptq.layerwise.write import rounding_fault
from lq_plugin.quantizers import WeightQuantizer

#: Bounds of V, and of α and β.
OFFSETS, SHARES = (-0.5, 0.5), (0.0, 1.0)


def tuned_qparams(
    scale: Tensor, zero_point: Tensor, grid: IntegerGrid, upper: Tensor, lower: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of shares of a range; the zero point is not rounded, so that it has a gradient.

    Args:
        scale, zero_point: of the whole range.
        grid: the integer levels.
        upper, lower: α and β, shaped like the scale; β None: there is no zero point.

    >>> one, grid = torch.tensor(1.0), IntegerGrid(0, 3, affine=True)
    >>> tuned_qparams(one, one, grid, upper=one / 4, lower=one)  # -1..2 becomes -1..0.5
    (tensor(0.5000), tensor(2.))
    """
    if lower is None:
        return (scale * upper).clamp(min=MIN_SCALE), zero_point
    low, high = bounds_from_qparams(scale, zero_point, grid)
    tuned = ((upper * high - lower * low) / (grid.levels - 1)).clamp(min=MIN_SCALE)
    return tuned, (grid.quant_min - lower * low / tuned).clamp(grid.quant_min, grid.quant_max)


class SignRounding(nn.Module):
    """Stand-in for a weight quantizer with integer levels while offsets and ranges are tuned.

    Args:
        quantizer: calibrated.
        weight: canonical, `[C_out, C_in, *kernel]`.
        learn_scale: α and β are tuned, too. Integer scales (VS-Quant) and those of block formats never are.
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, learn_scale: bool = False) -> None:
        super().__init__()
        self.name = quantizer.name
        self.shape, self.granularity = quantizer.shape, quantizer.spec.granularity
        self.w = blocks(weight.detach().float(), self.granularity)
        levels = quantizer.fixed_levels(self.w)
        assert isinstance(levels, IntegerLevels)
        self.levels = levels
        self.v = nn.Parameter(torch.zeros_like(self.w))
        ones, tuned = torch.ones_like(levels.scale), learn_scale and levels.trainable
        self.upper = nn.Parameter(ones) if tuned else None
        self.lower = nn.Parameter(ones.clone()) if tuned and levels.grid.affine else None

    @staticmethod
    def fault(layer: QuantizedLayer) -> str | None:
        """Returns why a layer's weight cannot be tuned; None when it can."""
        if (reason := rounding_fault(layer)) is not None:
            return reason
        quantizer = current_weight_quantizer(layer)
        assert quantizer is not None
        w = blocks(type(layer).canonical(layer, layer.weight).detach().float(), quantizer.spec.granularity)
        integers = type(quantizer.fixed_levels(w)) is IntegerLevels
        return None if integers else f"SignRound tunes integers, {quantizer.spec} has other levels"

    def signed(self) -> list[tuple[nn.Parameter, tuple[float, float]]]:
        """Returns what signed steps are made with, and its bounds."""
        shares = [(share, SHARES) for share in (self.upper, self.lower) if share is not None]
        return [(self.v, OFFSETS), *shares]

    def _qparams(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.levels.scale, self.levels.zero_point
        if self.upper is None:
            return scale, zero_point
        return tuned_qparams(scale, zero_point, self.levels.grid, self.upper, self.lower)

    def forward(self, weight: Tensor) -> Tensor:
        scale, zero_point = self._qparams()
        w = fake_quantize_learned(self.w + self.v * scale, scale, zero_point, self.levels.grid, band="rounded")
        return unblocks(w, self.shape, self.granularity).to(weight.dtype)

    @torch.no_grad()
    def rounded(self) -> tuple[Tensor, FixedLevels]:
        """Weight on the levels (canonical, float32), and the levels."""
        scale, zero_point = self._qparams()
        levels = replace(self.levels, scale=scale.detach().clone(), zero_point=zero_point.detach().round())
        return unblocks(levels.nearest(self.w + self.v * levels.scale), self.shape, self.granularity), levels
