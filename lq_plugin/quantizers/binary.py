"""Binary weights and inputs: BinaryConnect, BNN, BWN and XNOR-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_plugin.functional.binary_connect import LATENT_BOUND, sign
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.xnor_net import binary_weight, filter_scale
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.base import Levels
from lq_plugin.quantizers.weight import WeightQuantizer


class SignWeightQuantizer(WeightQuantizer):
    """-1 and +1 (see `lq_plugin.functional.binary_connect`).

    Stochastic binarization draws in training. It is evaluated with the deterministic sign, or, as in the paper's
    stochastic experiments, with the real-valued weights (`sign:float_eval`).
    """

    latent_bound = LATENT_BOUND

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        one = torch.ones(self.scale_shape, device=self.enabled.device)
        return one, torch.zeros_like(one)

    def levels(self, x: Tensor | None = None) -> Levels:
        one, _ = self.qparams()
        return Levels(-one, one, 2 * one)

    def quantize_values(self, x: Tensor) -> Tensor:
        if "float_eval" in self.spec.format_options and not self.training:
            return x
        noise = self.noise(x) if self.spec.stochastic and self.training else None
        return sign(x, noise, self.spec.threshold, self.spec.gradient == "clipped")


class BWNWeightQuantizer(WeightQuantizer):
    """Sign times the mean magnitude, both found anew from the weight at each call (see
    `lq_plugin.functional.xnor_net`)."""

    latent_bound = LATENT_BOUND

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha = self.scale_of(x)
        return alpha, torch.zeros_like(alpha)

    def levels(self, x: Tensor | None = None) -> Levels:
        alpha = self.scale_of(x)
        return Levels(-alpha, alpha, 2 * alpha)

    def scale_of(self, w: Tensor | None) -> Tensor:
        """α of the weight's blocks."""
        if w is None:
            raise ValueError(f"{self.name}: the scales of {self.spec} follow the weight; pass its blocks")
        return filter_scale(w, self.scale_shape, self.counts(w.device))

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        y = binary_weight(w, self.scale_of(w), "paper" in self.spec.format_options)
        return unblocks(y, self.shape, self.spec.granularity)


class SignActivationQuantizer(ActivationQuantizer):
    """-1 and +1 (BNN)."""

    needs_calibration = False

    def levels(self, x: Tensor | None = None) -> Levels:
        one = torch.ones_like(self.scale)
        return Levels(-one, one, 2 * one)

    def quantize_values(self, x: Tensor) -> Tensor:
        if "float_eval" in self.spec.format_options and not self.training:
            return x
        noise = self.noise(x) if self.spec.stochastic and self.training else None
        return sign(x, noise, self.spec.threshold, self.spec.gradient == "clipped")


class XNORActivationQuantizer(SignActivationQuantizer):
    """-1 and +1; the layer multiplies its output by K, the mean magnitude of each window (see
    `QuantizedLayer.output_scale`)."""

    scales_output = True
