"""Binary weights and inputs: BinaryConnect, BNN, BWN and XNOR-Net."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lq_plugin.functional.binary_connect import LATENT_BOUND, sign
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.xnor_net import binary_weight, filter_scale
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.quantizers.activation import ActivationQuantizer
from lq_plugin.quantizers.base import Levels, Quantizer
from lq_plugin.quantizers.integer import onnx_scale
from lq_plugin.quantizers.registry import Container, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.weight import WeightQuantizer


class _Signs(Quantizer):
    """Quantizer with the levels -1 and +1; `float_eval` leaves values as they are in evaluation."""

    def quantize_values(self, x: Tensor) -> Tensor:
        if "float_eval" in self.spec.format_options and not self.training:
            return x
        noise = self.noise(x) if self.spec.stochastic and self.training else None
        return sign(x, noise, self.spec.threshold, self.spec.gradient == "clipped")


class SignWeightQuantizer(_Signs, WeightQuantizer):
    """Weights of -1 and +1 (see `lq_plugin.functional.binary_connect`).

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


class BWNWeightQuantizer(WeightQuantizer):
    """Weights of -α and +α, the mean magnitude at each call (see `lq_plugin.functional.xnor_net`)."""

    latent_bound = LATENT_BOUND

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha = self.scale_of(x)
        return alpha, torch.zeros_like(alpha)

    def levels(self, x: Tensor | None = None) -> Levels:
        alpha = self.scale_of(x)
        return Levels(-alpha, alpha, 2 * alpha)

    def scale_of(self, w: Tensor | None) -> Tensor:
        """Returns α of the weight's blocks."""
        if w is None:
            raise ValueError(f"{self.name}: the scales of {self.spec} follow the weight; pass its blocks")
        return filter_scale(w, self.scale_shape, self.counts(w.device))

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        y = binary_weight(w, self.scale_of(w), "paper" in self.spec.format_options)
        return unblocks(y, self.shape, self.spec.granularity)


class SignActivationQuantizer(_Signs, ActivationQuantizer):
    """Activations of -1 and +1 (BNN)."""

    needs_calibration = False

    def levels(self, x: Tensor | None = None) -> Levels:
        one = torch.ones_like(self.scale)
        return Levels(-one, one, 2 * one)


class XNORActivationQuantizer(SignActivationQuantizer):
    """Activations of -1 and +1; the layer multiplies its output by K, the mean magnitude of each window."""


def _fault(spec: QuantSpec) -> str | None:
    floats = "float_eval" in spec.format_options
    return "it is evaluated with float weights, there is nothing to store" if floats else None


def _scale(quantizer: WeightQuantizer, w: Tensor) -> Statistics:
    return (quantizer.qparams(w)[0],)


def _encode(quantizer: WeightQuantizer, w: Tensor, *scale: Tensor) -> Parts:
    codes = {"codes": Part((w >= quantizer.spec.threshold).to(torch.int32), 1)}
    return codes | {"scale": Part(scale[0])} if scale else codes


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    return (2.0 * parts["codes"] - 1.0) * parts.get("scale", torch.ones(()))


def _container(spec: QuantSpec, values: Values) -> Container:
    scale, block = onnx_scale(spec, values.get("scale", torch.ones(1)))
    return Container(2 * values["codes"] - 1, 2, True, scale, block=block)


_SIGNS = Storage(_encode, _decode, fault=_fault, finite_codes=True)
register_format(
    "sign",
    FORMATS["sign"],
    weight=SignWeightQuantizer,
    activation=SignActivationQuantizer,
    storage=_SIGNS,
    onnx=_container,
)
register_format("xnor", FORMATS["xnor"], activation=XNORActivationQuantizer)
register_format(
    "bwn", FORMATS["bwn"], weight=BWNWeightQuantizer, storage=replace(_SIGNS, statistics=_scale), onnx=_container
)
