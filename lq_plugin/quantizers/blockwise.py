"""OCP MX and NVFP4 as quantizers: small floating point elements under a scale for each block."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lq_plugin.functional.affine import extremes
from lq_plugin.functional.block_kernel import fake_quantize_blocks, nvfp4_rule, ocp_rule
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.lookup import Reading, read_rows
from lq_plugin.functional.minifloat import E2M1, Minifloat
from lq_plugin.functional.nvfp4 import fake_quantize_nvfp4, nvfp4_scales, nvfp4_tensor_scale
from lq_plugin.functional.ocp_mx import ELEMENTS, ScaleMode, fake_quantize_mx, mx_scale
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.native.kernels import BlockRule
from lq_plugin.quantizers.base import Levels
from lq_plugin.quantizers.vector import VectorActivationQuantizer
from lq_plugin.quantizers.weight import WeightQuantizer


def element_and_mode(spec: QuantSpec) -> tuple[Minifloat, ScaleMode]:
    """Element format and scale mode of an OCP MX spec; the specification's `floor` unless it names another."""
    return ELEMENTS[spec.format_name], cast(ScaleMode, next(iter(spec.format_options), "floor"))


class BlockWeightQuantizer(WeightQuantizer):
    """A weight whose scales follow from its values at each call."""

    element: Minifloat

    def block_scale(self, w: Tensor) -> Tensor:
        """The scale of each of the weight's blocks, broadcastable to them."""
        raise NotImplementedError

    def quantize_blocks(self, w: Tensor) -> Tensor:
        """Fake-quantized blocks."""
        raise NotImplementedError

    def block_rule(self, w: Tensor) -> BlockRule:
        """What the kernels are to do with a weight: the same."""
        raise NotImplementedError

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x is None:
            raise ValueError(f"{self.name}: the scales of {self.spec} follow the weight; pass its blocks to qparams")
        scale = self.block_scale(x)
        return scale, torch.zeros_like(scale)

    def levels(self, x: Tensor | None = None) -> Levels:
        scale, _ = self.qparams(x)
        return Levels(
            -self.element.max_value * scale, self.element.max_value * scale, self.element.largest_step * scale
        )

    def quantize_values(self, x: Tensor) -> Tensor:
        done = fake_quantize_blocks(x, 1, lambda: self.block_rule(x))
        if done is not None:
            return done
        return unblocks(self.quantize_blocks(blocks(x, self.spec.granularity)), x.shape, self.spec.granularity)


class OCPWeightQuantizer(BlockWeightQuantizer):
    """Weights in MXFP8, MXFP6, MXFP4 or MXINT8 (see `lq_plugin.functional.ocp_mx`)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.element, self.mode = element_and_mode(self.spec)

    def block_scale(self, w: Tensor) -> Tensor:
        return mx_scale(w, self.element, self.mode)

    def quantize_blocks(self, w: Tensor) -> Tensor:
        return fake_quantize_mx(w, self.element, self.mode)

    def block_rule(self, w: Tensor) -> BlockRule:
        return ocp_rule(self.element, self.mode)

    def _rows_are_independent(self) -> bool:
        return True

    def quantize_rows(self, weight: Tensor, index: Tensor, reading: Reading) -> Tensor:
        return self.quantize_values(read_rows(weight, index.reshape(-1), reading)).view(*index.shape, -1)


class NVFP4WeightQuantizer(BlockWeightQuantizer):
    """Weights in NVFP4 (see `lq_plugin.functional.nvfp4`)."""

    element = E2M1

    def block_scale(self, w: Tensor) -> Tensor:
        scale, tensor_scale = nvfp4_scales(w)
        return scale * tensor_scale

    def quantize_blocks(self, w: Tensor) -> Tensor:
        return fake_quantize_nvfp4(w)

    def block_rule(self, w: Tensor) -> BlockRule:
        low, high = extremes(w, (1,) * w.ndim)
        return nvfp4_rule(nvfp4_tensor_scale(torch.maximum(-low, high)).item())


class OCPActivationQuantizer(VectorActivationQuantizer):
    """Activations in MXFP8, MXFP6, MXFP4 or MXINT8, blocks along the channels."""

    needs_calibration = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.element, self.mode = element_and_mode(self.spec)

    def rounded_vectors(self, vectors: Tensor) -> Tensor:
        return fake_quantize_mx(vectors, self.element, self.mode)

    def block_rule(self) -> BlockRule:
        return ocp_rule(self.element, self.mode)

    def levels(self, x: Tensor | None = None) -> None:
        return None


class NVFP4ActivationQuantizer(VectorActivationQuantizer):
    """Activations in NVFP4. The tensor's scale is calibrated, so that what a sample gets does not depend on its
    batch."""

    def rounded_vectors(self, vectors: Tensor) -> Tensor:
        return fake_quantize_nvfp4(vectors, self.scale)

    def block_rule(self) -> BlockRule:
        return nvfp4_rule(self.scale.item())

    def levels(self, x: Tensor | None = None) -> None:
        return None

    def _store(self, minimum: Tensor, maximum: Tensor) -> None:
        with torch.no_grad():
            self.scale.copy_(nvfp4_tensor_scale(torch.maximum(-minimum, maximum)))
