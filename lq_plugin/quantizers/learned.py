"""Quantizers whose range the optimizer trains: LSQ for weights and activations, PACT for activations."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lq_plugin.functional.affine import MIN_SCALE
from lq_plugin.functional.grouping import blocks, has_row_scales, unblocks
from lq_plugin.functional.lookup import (
    Reading,
    fake_quantize_learned_rows,
    fake_quantize_rows,
    read_rows,
    scales_of_rows,
)
from lq_plugin.functional.lsq import Band, fake_quantize_learned, gradient_scale
from lq_plugin.functional.pact import fake_quantize_pact
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.base import float32
from lq_plugin.quantizers.learned_ranges import give_quantizers
from lq_plugin.quantizers.weight import WeightQuantizer


class LSQWeightQuantizer(WeightQuantizer):
    """Learned step size of a weight, one per scale (see `lq_plugin.functional.lsq`)."""

    no_weight_decay = ("scale", "zero_point")
    #: Whether scales of rows have sparse gradients where their table has: what steps them must take such.
    sparse_gradients = False

    def make_qparams(self) -> None:
        self.scale = nn.Parameter(float32(1.0, self.scale_shape))
        self.zero_point = _zero_point(self, self.scale_shape)
        self._band = _band(self.spec)
        numel = torch.Size(self.shape).numel()
        self.gradient_factor = gradient_scale(numel // self.scale.numel(), self.spec.grid)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _effective(self)

    def quantize_values(self, x: Tensor) -> Tensor:
        return self._rounded(x, self.scale, self.zero_point)

    def _rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        group = self.spec.granularity
        y = fake_quantize_learned(
            blocks(x, group) if self._in_blocks else x,
            scale,
            zero_point,
            self._grid,
            self.gradient_factor,
            self._band,
            self.result_dtype(x),
        )
        return unblocks(y, x.shape, group) if self._in_blocks else y

    def _rows_are_independent(self) -> bool:
        return has_row_scales(self.spec.granularity)

    def quantize_rows(self, weight: Tensor, index: Tensor, reading: Reading) -> Tensor:
        scale, zero_point, group = self.scale, self.zero_point, self.spec.granularity
        if not torch.is_grad_enabled():
            done = fake_quantize_rows(weight, index, (scale, zero_point), self._grid, group, reading, learned=True)
        else:
            done = fake_quantize_learned_rows(
                weight, index, scale, zero_point, self._grid, group, self.gradient_factor, self._band, reading,
                self.sparse_gradients,
            )  # fmt: skip
        if done is not None:
            return done
        rows = read_rows(weight, index.reshape(-1), reading)
        scale, zero_point = scales_of_rows(scale, index), scales_of_rows(zero_point, index)
        y = self._rounded(rows, scale, zero_point).view(*index.shape, -1)
        if reading.padding_idx is None:
            return y
        # The padding trains nothing, scales neither.
        return torch.where((index == reading.padding_idx).unsqueeze(-1), y.detach(), y)


class LSQActivationQuantizer(ActivationQuantizer):
    """Learned step size (and, with `affine`, zero point) of an activation."""

    no_weight_decay = ("scale", "zero_point")

    def make_qparams(self) -> None:
        self.scale = nn.Parameter(float32(1.0, (self.channels,)))
        self.zero_point = _zero_point(self, (self.channels,))
        self._band = _band(self.spec)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _effective(self)

    def quantize_values(self, x: Tensor) -> Tensor:
        # N counts the features of one sample that share the scale: the batch size must not change the step.
        features = x.numel() // max(x.shape[0], 1) // self.channels
        factor = gradient_scale(features, self.spec.grid)
        scale, zero_point = self.scale, self.zero_point
        if self.per_channel:
            scale, zero_point = self.broadcastable(scale, x), self.broadcastable(zero_point, x)
        return fake_quantize_learned(x, scale, zero_point, self.spec.grid, factor, self._band, self.result_dtype(x))


class PACTActivationQuantizer(ActivationQuantizer):
    """Learned upper bound of a non-negative activation (see `lq_plugin.functional.pact`).

    Weight decay reaches α on purpose: the paper regularises it with the network's own.
    """

    def make_qparams(self) -> None:
        self.alpha = nn.Parameter(float32(1.0, (self.channels,)))

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha = self.alpha.detach().clamp(min=MIN_SCALE)
        return alpha / self.spec.grid.quant_max, torch.zeros_like(alpha)

    def quantize_values(self, x: Tensor) -> Tensor:
        return fake_quantize_pact(x, self.broadcastable(self.alpha, x), self.spec.grid.levels, self.result_dtype(x))

    def store_bounds(self, minimum: Tensor, maximum: Tensor) -> None:
        with torch.no_grad():
            self.alpha.copy_(maximum)


give_quantizers("lsq", LSQWeightQuantizer, LSQActivationQuantizer)
give_quantizers("pact", None, PACTActivationQuantizer)


def _zero_point(quantizer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Returns a parameter where the grid may shift, a buffer of zeros elsewhere."""
    if cast(WeightQuantizer, quantizer).spec.affine:
        return nn.Parameter(float32(0.0, shape))
    quantizer.register_buffer("zero_point", zeros := float32(0.0, shape))
    return zeros


def _band(spec: QuantSpec) -> Band:
    return "rounded" if spec.range_option == "rounded" else "paper"


def _effective(quantizer: WeightQuantizer | ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Returns the learned values as used: positive steps, integer zero points on the grid."""
    grid = quantizer.spec.grid
    scale = quantizer.scale.detach().abs().clamp(min=MIN_SCALE)
    return scale, quantizer.zero_point.detach().round().clamp(grid.quant_min, grid.quant_max)
